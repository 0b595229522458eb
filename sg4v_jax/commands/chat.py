"""`sg4v chat`."""

import argparse
from typing import Any

from sg4v_jax.commands.common import add_command, add_sampling, load_engine


def add(commands: Any) -> None:
    """Adds `chat` to the commands."""
    parser = add_command(
        commands,
        "chat",
        run,
        "Talks about an image; without a question, asks for them line by line.",
        '  sg4v chat --model runs/sft --image cat.jpg "What is the cat doing?"',
    )
    add_sampling(parser, 512, slots=1)
    parser.add_argument("question", nargs="?", help="one question; none: a conversation")
    parser.add_argument("--image", action="append", default=[], help="an image file; may be repeated")


def run(arguments: argparse.Namespace, config_argv: list[str]) -> None:
    """Runs `chat`."""
    from sg4v_jax.infer.chat import chat

    engine, options = load_engine(arguments)
    chat(engine, arguments.image, arguments.question, options)
