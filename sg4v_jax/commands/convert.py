"""`sg4v convert`."""

import argparse
from typing import Any

from sg4v_jax.commands.common import add_command


def add(commands: Any) -> None:
    """Adds `convert` to the commands."""
    parser = add_command(
        commands,
        "convert",
        run,
        "Converts a model: a training run, HF LLaVA or share4v directory, to HF LLaVA or share4v.",
        "  sg4v convert --model runs/sft --output llava-hf --to hf",
    )
    parser.add_argument("--model", required=True, help="training run, HF LLaVA or share4v directory")
    parser.add_argument("--output", required=True, help="new directory")
    parser.add_argument("--to", choices=("hf", "share4v"), default="hf", help="layout to write")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--overwrite", action="store_true", help="replace a directory that isn't empty")


def run(arguments: argparse.Namespace, config_argv: list[str]) -> None:
    """Runs `convert`."""
    from sg4v_jax.convert.load import load_model, save_model

    save_model(
        load_model(arguments.model),
        arguments.output,
        layout=arguments.to,
        dtype=arguments.dtype,
        overwrite=arguments.overwrite,
    )
    print(f"wrote {arguments.output}")
