"""`sg4v demo`."""

import argparse
from typing import Any

from sg4v_jax.commands.common import add_command


def add(commands: Any) -> None:
    """Adds `demo` to the commands."""
    parser = add_command(
        commands,
        "demo",
        run,
        "The whole loop on the embedded world: build, train a captioner, re-caption, pre-train, SFT, "
        "answer, score, export, reload.",
        "  sg4v demo --workdir runs/demo",
    )
    parser.add_argument("--workdir", default="runs/demo", help="where everything goes; a second run resumes")
    parser.add_argument("--scenes", type=int, default=0, help="training scenes; 0: as many as it learns from")
    parser.add_argument("--steps", type=float, default=1.0, help="factor on the number of training steps")
    parser.add_argument("--seed", type=int, default=0)


def run(arguments: argparse.Namespace, config_argv: list[str]) -> None:
    """Runs `demo`."""
    from sg4v_jax.demo.run import run_demo

    run_demo(
        arguments.workdir, train_scenes=arguments.scenes, step_factor=arguments.steps, seed=arguments.seed
    )
