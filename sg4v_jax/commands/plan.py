"""`sg4v plan`."""

import argparse
from typing import Any

from sg4v_jax.commands.common import add_command, progress_bar


def add(commands: Any) -> None:
    """Adds `plan` to the commands."""
    parser = add_command(
        commands,
        "plan",
        run,
        "Compiles a config for a TPU slice, without one: memory, FLOPs, collectives, least step time. "
        "Ends with an error if it doesn't fit. Needs libtpu.",
        "  sg4v plan --config=configs/pretrain.py:7b --topology=v5e:8x8 --output plan.html",
        takes_config=True,
    )
    parser.add_argument(
        "--topology", required=True, help="v5e:8x8, v4:2x2x4, or as gcloud says: v5p-32; 2xv5e-64: two slices"
    )
    parser.add_argument(
        "--steps", default="train", help="of train, prefill, insert, decode; caption: all but train"
    )
    parser.add_argument("--slots", type=int, help="prompts decoded at a time [8 for each part of the batch]")
    parser.add_argument("--prompt", type=int, default=704, help="positions of a prompt with its image")
    parser.add_argument("--answer", type=int, default=256, help="tokens of an answer")
    parser.add_argument("--capacity", type=int, default=1024, help="positions of a slot's cache")
    parser.add_argument("--weights", choices=("float", "int8"), default="float", help="of generation")
    parser.add_argument("--kv", choices=("float", "int8"), default="float", help="keys and values")
    parser.add_argument("--search", action="store_true", help="tries meshes, microbatches and remat policies")
    parser.add_argument("--tries", type=int, default=8, help="programs that --search compiles")
    parser.add_argument("--output", help="plan.html or plan.json")
    parser.add_argument("--hlo", help="folder for the text of the compiled programs")


def run(arguments: argparse.Namespace, config_argv: list[str]) -> None:
    """Runs `plan`."""
    import json
    import os

    # It compiles for TPUs on whatever machine this is.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")

    from sg4v_jax import config
    from sg4v_jax.plan import report, topology
    from sg4v_jax.plan.memory import OutOfMemory
    from sg4v_jax.plan.plan import captions_per_second, plan_serving, plan_train
    from sg4v_jax.plan.programs import SERVING, STEPS, Serving
    from sg4v_jax.plan.search import search

    if arguments.output and not arguments.output.endswith((".html", ".json")):
        raise ValueError(f"--output {arguments.output} ends neither in .html nor in .json")
    steps = arguments.steps.split(",")
    if unknown := [step for step in steps if step not in STEPS]:
        raise ValueError(f"--steps {unknown[0]!r} is not one of {', '.join(STEPS)}")
    run_config = config.parse(config_argv)
    where = topology.parse(arguments.topology)
    serving = Serving(
        slots=arguments.slots or 8 * where.num_chips,
        prompt=arguments.prompt,
        answer=arguments.answer,
        capacity=arguments.capacity,
        weights=arguments.weights,
        kv=arguments.kv,
    )
    plans = []
    try:
        if arguments.search:
            run_config, best = search(run_config, where, arguments.tries, progress_bar("programs"), _tell)
            plans.append(best)
        elif "train" in steps:
            plans.append(plan_train(run_config, where))
        if set(steps) - {"train"}:
            served = plan_serving(run_config, where, serving)
            plans += [served[step] for step in SERVING if step in steps or "caption" in steps]
        print("\n\n".join(map(report.text, plans)))
        if "caption" in steps:
            rate = captions_per_second(served, serving.answer)
            print(f"\ncaptions of {serving.answer} tokens: at most {rate:.1f} a second")
    except OutOfMemory as error:
        raise ValueError(report.failure(error, where)) from error
    for plan in plans if arguments.hlo else ():
        _write(os.path.join(arguments.hlo, f"{plan.step}.txt"), plan.hlo)
    if arguments.output and arguments.output.endswith(".html"):
        _write(arguments.output, report.page(plans, f"{' '.join(config_argv)} on {where.name}"))
    elif arguments.output:
        _write(arguments.output, json.dumps([plan.to_dict() for plan in plans], indent=1))
    if any(not plan.fits for plan in plans):
        raise ValueError(f"does not fit {where.name}; see above")


def _tell(line: str) -> None:
    """Prints above the bar, not into it, and at once: the next line is minutes away."""
    import sys

    import tqdm

    tqdm.tqdm.write(line)
    sys.stdout.flush()


def _write(path: str, text: str) -> None:
    """Writes a file as a whole, and says so."""
    import os

    from sg4v_jax import atomic

    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    atomic.write(path, text)
    print(path)
