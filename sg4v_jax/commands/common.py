"""What the commands share: help texts, progress bars, sampling flags."""

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import Any


class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keeps examples as written and shows defaults."""


def add_command(
    commands: Any, name: str, run: Callable[..., None], help: str, example: str, *, takes_config: bool = False
) -> Any:
    """A sub-command with its example in the help; `run(arguments, config_argv)` does it.

    `takes_config` allows `--config=FILE` and its overrides, which `run` gets as `config_argv`.
    """
    parser = commands.add_parser(
        name, help=help, description=f"{help}\n\nexample:\n{example}", formatter_class=HelpFormatter
    )
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    parser.set_defaults(run=run, takes_config=takes_config)
    return parser


def progress_bar(unit: str) -> Callable[..., Any]:
    """Wraps an iterable in a bar, where there is a terminal to draw it on."""
    import functools

    import tqdm

    return functools.partial(tqdm.tqdm, unit=f" {unit}", disable=not sys.stderr.isatty())


def progress_of(unit: str) -> Callable[[Iterable[Any]], Iterable[Any]]:
    """`progress_bar`; without a terminal, as on a pod, a line every minute."""
    return progress_bar(unit) if sys.stderr.isatty() else lambda items: progress_lines(items, unit)


def progress_lines(items: Iterable[Any], unit: str, every: float = 60.0) -> Iterator[Any]:
    """The items; between them, as often as that many seconds, a line with how many and what is left."""
    import tqdm

    total = len(items) if isinstance(items, Sized) else None
    start = shown = time.monotonic()
    for count, item in enumerate(items, start=1):
        yield item
        now = time.monotonic()
        if now - shown >= every:
            shown = now
            line = tqdm.tqdm.format_meter(count, total, now - start, ncols=0, unit=f" {unit}")
            print(line.strip(), file=sys.stderr, flush=True)


def add_sampling(
    parser: Any, max_new_tokens: int | None, slots: int = 16, *, needs_model: bool = True
) -> None:
    """Flags of everything that generates."""
    parser.add_argument("--model", required=needs_model, help="training run, HF LLaVA or share4v directory")
    parser.add_argument("--max-new-tokens", type=int, default=max_new_tokens)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--top-k", type=int, default=0, help="0 is off")
    parser.add_argument("--repetition-penalty", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--min-new-tokens", type=int, default=0)
    parser.add_argument("--no-repeat-ngram", type=int, default=0, help="0 is off")
    parser.add_argument("--num-beams", type=int, default=1, help="width of a beam search; 1 is none")
    parser.add_argument(
        "--length-penalty", type=float, default=1.0, help="of beams: favours long ones above 0"
    )
    parser.add_argument(
        "--stop", action="append", default=[], help="text that ends an answer; may be repeated"
    )
    add_engine(parser, slots)


def add_engine(parser: Any, slots: int) -> None:
    """Flags of the engine itself."""
    parser.add_argument("--dtype", default="bfloat16", help="what to compute in")
    parser.add_argument("--weights", choices=("float", "int8"), default="float")
    parser.add_argument("--kv", choices=("float", "int8"), default="float", help="keys and values")
    parser.add_argument("--slots", type=int, default=slots, help="answers, or beams, generated together")
    parser.add_argument("--capacity", type=int, default=2048, help="most tokens of prompt and answer")
    parser.add_argument("--tensor", type=int, default=1, help="devices that share one copy of the model")


def load_engine(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """(engine, sampling options) that the flags of `add_sampling` ask for; each process has its own."""
    from sg4v_jax.infer.options import SamplingOptions

    options = SamplingOptions(
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        top_k=arguments.top_k,
        repetition_penalty=arguments.repetition_penalty,
        seed=arguments.seed,
        min_new_tokens=arguments.min_new_tokens,
        no_repeat_ngram=arguments.no_repeat_ngram,
        num_beams=arguments.num_beams,
        length_penalty=arguments.length_penalty,
        stop=tuple(arguments.stop),
    )
    return make_engine(arguments.model, arguments, arguments.num_beams), options


def make_engine(model: str, arguments: argparse.Namespace, num_beams: int = 1) -> Any:
    """The engine that the flags of `add_engine` ask for, with the model of a directory."""
    import jax

    from sg4v_jax.convert.load import load_model
    from sg4v_jax.infer.engine import Engine
    from sg4v_jax.parallel.mesh import make_mesh

    # Each process has its own work, and its own devices.
    mesh = make_mesh(data=-1, fsdp=1, tensor=arguments.tensor, devices=jax.local_devices())
    engine = Engine(
        load_model(model),
        mesh,
        arguments.dtype,
        weights=arguments.weights,
        kv=arguments.kv,
        slots=arguments.slots,
        num_beams=num_beams,
        capacity=arguments.capacity,
    )
    if jax.process_index() == 0:
        print(engine.memory.describe(), file=sys.stderr)
    return engine
