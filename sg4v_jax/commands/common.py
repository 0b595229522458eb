"""What the commands share: help texts, progress bars, sampling flags."""

import argparse
import sys
from collections.abc import Callable
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


def add_sampling(parser: Any, max_new_tokens: int) -> None:
    """Flags of everything that generates."""
    parser.add_argument("--model", required=True, help="training run, HF LLaVA or share4v directory")
    parser.add_argument("--max-new-tokens", type=int, default=max_new_tokens)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--top-k", type=int, default=0, help="0 is off")
    parser.add_argument("--repetition-penalty", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="bfloat16", help="what to compute in")


def load_generator(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """(generator, sampling options) that the flags of `add_sampling` ask for."""
    from sg4v_jax.convert.load import load_model
    from sg4v_jax.infer.generate import Generator
    from sg4v_jax.infer.sampling import SamplingOptions
    from sg4v_jax.parallel.mesh import make_mesh

    options = SamplingOptions(
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        top_k=arguments.top_k,
        repetition_penalty=arguments.repetition_penalty,
        seed=arguments.seed,
    )
    return Generator(load_model(arguments.model), make_mesh(), arguments.dtype), options
