"""A conversion that is killed, or that finds no room: a whole checkpoint or none, and nothing else."""

import contextlib
import multiprocessing
import os
import pathlib
import random
import shutil
import signal
import time
from typing import Any

import numpy as np
import pytest

from sg4v_jax.__main__ import main
from sg4v_jax.convert.bundle import ModelBundle
from sg4v_jax.convert.compare import compare
from sg4v_jax.convert.load import as_checkpoint, convert, open_checkpoint
from sg4v_jax.convert.params import param_shapes
from sg4v_jax.models.config import ModelConfig, TextConfig, VisionConfig
from tests.disk import small_files

TARGETS = ("hf", "share4v", "run")
# About 200 MB, in many tensors.
LARGE = ModelConfig(
    vision=VisionConfig(512, 2048, 6, 8, 28, 14),
    text=TextConfig(3000, 512, 2048, 8, 8, 8),
)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A checkpoint that takes long enough to write for a kill to come in between."""
    from flax.traverse_util import unflatten_dict

    generator = np.random.default_rng(0)
    params = unflatten_dict(
        {path: generator.random(shape, np.float32) for path, shape in param_shapes(LARGE).items()}
    )
    directory = tmp_path_factory.mktemp("large") / "model"
    convert(as_checkpoint(ModelBundle(LARGE, params, None)), directory, layout="hf")
    assert open_checkpoint(directory).nbytes > 180e6
    return directory


@pytest.fixture(scope="module")
def processes() -> Any:
    """Processes that have the library imported, but no JAX backend and none of this one's threads."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["sg4v_jax.__main__", "sg4v_jax.convert.load"])
    return context


@pytest.fixture
def argv(large: pathlib.Path, tmp_path: pathlib.Path) -> list[str]:
    return ["convert", f"--model={large}", f"--output={tmp_path / 'out'}", "--max-shard-size=20MB"]


def written(directory: pathlib.Path) -> int:
    """Bytes in a directory that another process may be writing or renaming."""
    total = 0
    for folder, _, files in os.walk(directory):
        for file in files:
            with contextlib.suppress(FileNotFoundError):
                total += os.stat(os.path.join(folder, file)).st_size
    return total


def wait_for(process: Any, directory: pathlib.Path, nbytes: float) -> None:
    while process.is_alive() and written(directory) < nbytes:
        time.sleep(0.001)


def assert_whole(directory: pathlib.Path, large: pathlib.Path) -> None:
    found = compare(open_checkpoint(large), open_checkpoint(directory))
    assert found.compared == len(open_checkpoint(large).tensors) and not found.differences


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_killed(
    target: str, argv: list[str], large: pathlib.Path, processes: Any, tmp_path: pathlib.Path
) -> None:
    """At three moments: in the first tensors, somewhere, and near the end."""
    out = tmp_path / "out"
    total, codes = open_checkpoint(large).nbytes, []
    for fraction in (0.01, random.random(), 0.97):
        process = processes.Process(target=main, args=([*argv, f"--to={target}"],))
        process.start()
        wait_for(process, tmp_path, fraction * total)
        process.kill()
        process.join()
        codes.append(process.exitcode)
        print(
            f"{target}: at {fraction:.0%}, {process.exitcode}, {[path.name for path in tmp_path.iterdir()]}"
        )
        if out.exists():
            assert_whole(out, large)
            shutil.rmtree(out)
    assert codes[0] == -signal.SIGKILL, "the first kill comes in time"
    main([*argv, f"--to={target}"])
    assert_whole(out, large)
    assert [path.name for path in tmp_path.iterdir()] == ["out"], "nothing else is left"


@pytest.mark.slow
def test_killed_while_replacing(
    argv: list[str], large: pathlib.Path, processes: Any, tmp_path: pathlib.Path
) -> None:
    """What was there before stays until the new one is complete."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out/old").write_text("old")
    process = processes.Process(target=main, args=([*argv, "--overwrite"],))
    process.start()
    wait_for(process, tmp_path, 1e8)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert (tmp_path / "out/old").read_text() == "old"
    main([*argv, "--overwrite"])
    assert_whole(tmp_path / "out", large)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.slow
def test_second_writer_is_refused(
    argv: list[str],
    large: pathlib.Path,
    processes: Any,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """While the first is at work, even if it has stopped for the moment; the first then finishes."""
    process = processes.Process(target=main, args=(argv,))
    process.start()
    wait_for(process, tmp_path, 1e7)
    os.kill(process.pid, signal.SIGSTOP)
    try:
        with pytest.raises(SystemExit):
            main(argv)
        assert ".out.partial is being written by another process" in capsys.readouterr().err
    finally:
        os.kill(process.pid, signal.SIGCONT)
        process.join()
    assert process.exitcode == 0
    assert_whole(tmp_path / "out", large)


@pytest.mark.parametrize("target", TARGETS)
def test_no_room(
    target: str,
    argv: list[str],
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Seen before anything is written."""
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10**8))
    with pytest.raises(SystemExit) as caught:
        main([*argv, f"--to={target}"])
    assert caught.value.code == 2
    assert f"{tmp_path}: 0.2 GB to write, 0.1 GB free" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


# Orbax leaves a task behind that finds its loop closed.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("target", TARGETS)
def test_disk_full_in_the_middle(
    target: str,
    argv: list[str],
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with small_files(1 << 20), pytest.raises(SystemExit) as caught:
        main([*argv, f"--to={target}"])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert "File too large" in error and str(tmp_path) in error
    assert not list(tmp_path.iterdir())
