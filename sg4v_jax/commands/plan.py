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
    parser.add_argument("--topology", required=True, help="v5e:8x8, v4:2x2x4, or as gcloud says: v5p-32")
    parser.add_argument("--steps", default="train", help="of train, prefill, decode; with commas")
    parser.add_argument("--slots", type=int, help="prompts decoded at a time [8 for each part of the batch]")
    parser.add_argument("--prompt", type=int, default=704, help="positions of a prompt with its image")
    parser.add_argument("--capacity", type=int, default=1024, help="positions of a slot's cache")
    parser.add_argument("--search", action="store_true", help="tries meshes, rows and remat policies")
    parser.add_argument("--tries", type=int, default=8, help="programs that --search compiles")
    parser.add_argument("--cycles", action="store_true", help="count the kernels' cycles (takes minutes)")
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
    from sg4v_jax.plan.plan import plan_serving, plan_train
    from sg4v_jax.plan.programs import STEPS, Serving
    from sg4v_jax.plan.search import search

    if arguments.output and not arguments.output.endswith((".html", ".json")):
        raise ValueError(f"--output {arguments.output} ends neither in .html nor in .json")
    steps = arguments.steps.split(",")
    if unknown := [step for step in steps if step not in STEPS]:
        raise ValueError(f"--steps {unknown[0]!r} is not one of {', '.join(STEPS)}")
    run_config = config.parse(config_argv)
    where = topology.parse(arguments.topology)
    serving = Serving(arguments.slots or 8 * where.num_chips, arguments.prompt, arguments.capacity)
    plans, best = [], None
    try:
        if arguments.search:
            run_config, best = search(run_config, where, arguments.tries, progress_bar("programs"), print)
        for step in steps:
            if step == "train" and best and not arguments.cycles:
                plans.append(best)
            elif step == "train":
                plans.append(plan_train(run_config, where, cycles=arguments.cycles))
            else:
                plans.append(plan_serving(run_config, where, step, serving, cycles=arguments.cycles))
            print(report.text(plans[-1]) + "\n")
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


def _write(path: str, text: str) -> None:
    """Writes a file as a whole, and says so."""
    import os

    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with open(f"{path}.tmp", "w", encoding="utf-8") as file:
        file.write(text)
    os.replace(f"{path}.tmp", path)
    print(path)
