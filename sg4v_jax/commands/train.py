"""`sg4v train`."""

import argparse
from typing import Any

from sg4v_jax.commands.common import add_command
from sg4v_jax.commands.processes import add_processes, join


def add(commands: Any) -> None:
    """Adds `train` to the commands."""
    parser = add_command(
        commands,
        "train",
        run,
        "Trains: a captioner, pre-training or SFT, as --config says. Goes on where it was cut off.",
        "  sg4v train --config=configs/pretrain.py:7b --workdir=runs/pretrain \\\n"
        "    --config.data.tokenizer=vicuna/tokenizer.model --config.init.text=vicuna \\\n"
        "    --config.data.sources.share_captioner.directory=datasets/llava/pt/1.0.0",
        takes_config=True,
    )
    parser.add_argument("--workdir", required=True, help="checkpoints, metrics and the config go here")
    add_processes(parser)


def run(arguments: argparse.Namespace, config_argv: list[str]) -> None:
    """Runs `train`."""
    from sg4v_jax import config
    from sg4v_jax.train.loop import train

    run_config = config.parse(config_argv)
    is_main = join(arguments)
    values = train(run_config, arguments.workdir)
    if is_main:
        print(f"{arguments.workdir}: done, loss {values.get('loss', float('nan')):.4f}")
