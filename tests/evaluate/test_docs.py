"""The page about evaluation: its commands are commands, its table is complete."""

import argparse
import pathlib
import shlex

import pytest

from sg4v_jax.commands import evaluate
from sg4v_jax.evaluate.benchmark import Benchmark
from sg4v_jax.evaluate.registry import BENCHMARKS, get_benchmarks
from sg4v_jax.evaluate.settings import Choices

PAGE = (pathlib.Path(__file__).parents[2] / "docs/evaluation.md").read_text()
COMMANDS = [
    line
    for block in PAGE.split("```bash\n")[1:]
    for line in block.split("```")[0].splitlines()
    if line.startswith("sg4v")
]


@pytest.mark.parametrize("command", COMMANDS)
def test_commands(command: str) -> None:
    parser = argparse.ArgumentParser()
    evaluate.add(parser.add_subparsers())
    arguments = parser.parse_args(shlex.split(command)[1:])
    if arguments.benchmarks and arguments.benchmarks != "list":
        assert get_benchmarks(arguments.benchmarks) and Choices(mode=arguments.mode)


@pytest.mark.parametrize("benchmark", BENCHMARKS.values(), ids=BENCHMARKS)
def test_the_table_of_files(benchmark: Benchmark) -> None:
    (row,) = [line for line in PAGE.splitlines() if line.startswith(f"| `{benchmark.name}` |")]
    assert f"| `{benchmark.folders[0]}` |" in row
