"""Launch configs, and what is refused before anything costs money."""

import pathlib
import shlex
from typing import Any

import pytest

from launch import config
from sg4v_jax import config as run_configs
from sg4v_jax.train import preemption
from tests.launch.conftest import REPOSITORY, make_launch

FILES = sorted(
    path.name
    for path in (REPOSITORY / "launch/configs").glob("*.py")
    if path.stem not in ("__init__", "common")
)


@pytest.fixture(autouse=True)
def in_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)


@pytest.mark.parametrize("size", ["7b", "13b"])
@pytest.mark.parametrize("name", FILES)
def test_files(name: str, size: str) -> None:
    """Each runs a config that there is, on a slice that there is."""
    argv = [f"--config=launch/configs/{name}:{size}", "--config.zone=us-west4-a"]
    launch = config.load(argv)
    assert launch.command[:2] == ("sg4v", "train")
    (run_config,) = [part for part in launch.command if part.startswith("--config=")]
    assert run_configs.parse([run_config]).stage == pathlib.Path(name).stem
    assert f"--workdir={launch.workdir}" in launch.command
    assert launch.slice.chips == (64 if size == "7b" else 256)
    assert f"{launch.slice.chips} chip-hours" in config.describe(launch)


def test_overrides_and_a_command_of_ones_own() -> None:
    own, argv, command = config.split(
        shlex.split(
            "run --config=launch/configs/pretrain.py:7b --dry-run --config.zone us-east5-a "
            "--config.accelerator=v5p-32 --config.slices=2 --config.workdir=/mnt/x "
            "-- sg4v train --config=configs/align.py --workdir={workdir}/align"
        )
    )
    assert own == ["run", "--dry-run"]
    launch = config.load(argv, command)
    assert (launch.zone, launch.slice.name, launch.runtime_version) == (
        "us-east5-a",
        "v5p-32",
        "v2-alpha-tpuv5",
    )
    assert launch.nodes == ["sg4v-pretrain-7b-0", "sg4v-pretrain-7b-1"]
    assert launch.command == ("sg4v", "train", "--config=configs/align.py", "--workdir=/mnt/x/align")
    assert "2 x v5p-32 (2x2x4), 8 workers" in config.describe(launch)


def test_the_exit_code_is_the_one_that_training_reads() -> None:
    assert config.EXIT_CODE == preemption.EXIT_CODE
    assert make_launch(env={"A": 1}).job_env == {preemption.EXIT_CODE: "75", "A": "1"}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"zone": None}, "config.zone is not set"),
        ({"name": "Pod_1"}, "config.name='Pod_1'"),
        ({"name": "x" * 60}, "up to 49"),
        ({"capacity": "free"}, "config.capacity='free' is not one of on-demand, spot, reserved"),
        ({"slices": 0}, "config.slices=0"),
        ({"command": ()}, "config.command is empty"),
        ({"workdir": "runs"}, "config.workdir='runs' must be absolute"),
        ({"workdir": "gs://bucket/runs"}, "must be absolute"),
        ({"accelerator": "v4-12"}, "the nearest are v4-8 and v4-16"),
        ({"env": {"a b": "c"}}, "'a b'"),
        ({"wait__poll_seconds": 0.0}, "poll_seconds"),
    ],
)
def test_bad_fields(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        make_launch(**overrides)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "no launch config given; there are launch/configs/captioner.py"),
        (["--config=configs/pretrain.py:7b"], "configs/pretrain.py:7b is no launch config (accelerator,"),
        (["--config=launch/configs/pretrian.py"], "no launch config launch/configs/pretrian.py; there are"),
        (["--config=launch/configs/pretrain.py:9b"], "size '9b' is not one of ('7b', '13b')"),
        (["--config=launch/configs/pretrain.py:7b", "--config.zoen=x"], "did you mean config.zone?"),
    ],
)
def test_bad_command_lines(argv: list[str], message: str) -> None:
    with pytest.raises(ValueError) as error:
        config.load(argv)
    assert message in str(error.value)
