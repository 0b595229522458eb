"""The `sg4v` command: parses, then calls the room that does the work."""

import argparse
import os
import sys
from collections.abc import Sequence

from sg4v_jax.commands import caption, chat, collect, convert, data, demo, evaluate, plan, report, train
from sg4v_jax.commands.common import HelpFormatter

DESCRIPTION = """\
ShareGPT4V on JAX: better captions make better multimodal models.

the loop:
  sg4v demo                   everything below, small, on a world that ships with the library
  sg4v collect                dense captions from GPT4-Vision, to train a captioner on
  sg4v data check             what is wrong with a data file and its images
  sg4v data build             LLaVA-format JSON + images -> a dataset
  sg4v data show              a packed batch as a person would want to see it
  sg4v plan                   does it fit a TPU pod, and how fast can it be: without a pod
  sg4v train                  a captioner, pre-training, SFT: one --config each
  sg4v caption                a corpus of images -> captions, restartable
  sg4v report                 what captions are like, compared and voted on
  sg4v chat                   talk about an image
  sg4v eval                   answer a benchmark's questions, and score them
  sg4v convert                to and from Hugging Face LLaVA and the original layout
  sg4v info                   what a model directory holds

`sg4v COMMAND --help` explains each, with an example.
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `sg4v` and `python -m sg4v_jax`."""
    own, config_argv = split_config(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser("sg4v", description=DESCRIPTION, formatter_class=HelpFormatter)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for module in (demo, data, collect, plan, train, caption, report, chat, evaluate, convert):
        module.add(commands)
    arguments = parser.parse_args(own)
    if config_argv and not arguments.takes_config:
        parser.error(f"{_name(arguments)} takes no --config")
    _quiet()
    try:
        arguments.run(arguments, config_argv)
    except (ValueError, OSError) as error:
        # Errors of this library name the file, record or key and the fix; a traceback adds nothing.
        if arguments.debug:
            raise
        print(f"sg4v {_name(arguments)}: error: {error}", file=sys.stderr)
        raise SystemExit(2) from error


def _name(arguments: argparse.Namespace) -> str:
    """As it was typed: `train`, `data build`."""
    return " ".join(filter(None, [arguments.command, getattr(arguments, "action", None)]))


def _quiet() -> None:
    """This library's messages from INFO up, everybody else's from ERROR up."""
    import logging

    import absl.logging

    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    absl.logging.set_verbosity(absl.logging.ERROR)
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
    logger = logging.getLogger("sg4v_jax")
    logger.handlers[:] = [handler]  # Not one more for each call in the same process.
    logger.setLevel(logging.INFO)
    logger.propagate = False


def split_config(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """(the command's own arguments, those of its config)."""
    own, config = [], []
    rest = list(argv)
    while rest:
        argument = rest.pop(0)
        if argument.split("=")[0].split(".")[0] != "--config":
            own.append(argument)
        elif "=" not in argument and rest:
            config.append(f"{argument}={rest.pop(0)}")
        else:
            config.append(argument)
    return own, config


if __name__ == "__main__":
    main()
