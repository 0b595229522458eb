"""What a run survives: damaged checkpoints, failed saves, full disks, steps that are not finite, kills.

Data workers that die are in tests/data/test_loader.py, notices of preemption in test_resume.py, what is only
watched in test_full_disk.py.
"""

import contextlib
import json
import logging
import os
import pathlib
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sg4v_jax.convert import manifest
from sg4v_jax.convert.orbax import CHECKPOINTS, load_run, open_run, read_meta
from sg4v_jax.train import checkpoint, first_batch, goodput, loop, profiler
from sg4v_jax.train.checkpoint import Checkpointer
from sg4v_jax.train.nonfinite import NonFinite, load_batch
from tests.conftest import TinyWorld
from tests.disk import small_files
from tests.train import faults
from tests.train.test_resume import REPOSITORY, logged

PARAMS = {"a": {"w": np.arange(6000, dtype=np.float32)}, "b": np.arange(5.0)}


def data() -> grain.DatasetIterator:
    return iter(grain.MapDataset.source([0, 1]).to_iter_dataset(grain.ReadOptions(num_threads=0)))


def save(checkpointer: Checkpointer, step: int, **options: Any) -> None:
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf + step), PARAMS)
    checkpointer.save(step, params, {"mu": jnp.full(3, step)}, data(), {"step": step}, **options)


def restored(checkpointer: Checkpointer, step: int) -> Any:
    shapes = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, PARAMS))
    opt_shapes = {"mu": jax.ShapeDtypeStruct((3,), jnp.int32)}
    return checkpointer.restore(step, shapes, opt_shapes, data(), lambda states: states[0])[0]


def run_of(workdir: pathlib.Path, steps: tuple[int, ...], **options: Any) -> None:
    checkpointer = Checkpointer(workdir, **{"keep": 9} | options)
    for step in steps:
        save(checkpointer, step)
    checkpointer.close()


def largest(directory: pathlib.Path) -> pathlib.Path:
    return max(
        (path for path in directory.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size
    )


def flip(newest: pathlib.Path) -> str:
    path = largest(newest / "params")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    return f"{path} is damaged: its checksum is another one"


def cut(newest: pathlib.Path) -> str:
    path = largest(newest / "opt_state")
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[: size // 2])
    return f"{path} has {size // 2:,} bytes instead of {size:,}"


def lose(item: str, said: str) -> Callable[[pathlib.Path], str]:
    def remove(newest: pathlib.Path) -> str:
        (found,) = newest.glob(item)
        shutil.rmtree(found) if found.is_dir() else found.unlink()
        return said

    return remove


def spoil_list(newest: pathlib.Path) -> str:
    path = newest / manifest.ITEM / manifest.FILE
    path.write_text(path.read_text().replace('"files": {', '"files": {"params/x": [1, "00000000"], '))
    return f"{path} is damaged: its checksum is another one"


DAMAGES = {
    "a bit flipped": flip,
    "a file cut": cut,
    "no data item": lose("data", "No such file"),
    "no list of files": lose("manifest", "the checkpoint is not complete"),
    "a wrong list of files": spoil_list,
}


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_checkpoint_is_set_aside(
    how: str, tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    run_of(tmp_path, (1, 2, 3))
    said = DAMAGES[how](tmp_path / CHECKPOINTS / "3")
    checkpointer = Checkpointer(tmp_path, keep=9)
    assert checkpointer.latest_step() == 2
    (line,) = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert "the checkpoint of step 3 is damaged" in line and "the run goes back to step 2" in line
    assert said in line and (tmp_path / "damaged" / "3" / "meta").exists()
    np.testing.assert_array_equal(restored(checkpointer, 2)["a"]["w"], PARAMS["a"]["w"] + 2)
    # The step can be saved again, and be damaged again.
    save(checkpointer, 3)
    checkpointer.close()
    flip(tmp_path / CHECKPOINTS / "3")
    assert Checkpointer(tmp_path, keep=9).latest_step() == 2
    assert {path.name for path in (tmp_path / "damaged").iterdir()} == {"3", "3-1"}


def test_no_good_checkpoint_is_an_error_not_a_fresh_start(tmp_path: pathlib.Path) -> None:
    assert Checkpointer(tmp_path, keep=2).latest_step() is None
    run_of(tmp_path, (1, 2))
    first, second = flip(tmp_path / CHECKPOINTS / "1"), cut(tmp_path / CHECKPOINTS / "2")
    for _ in range(2):
        with pytest.raises(manifest.DamagedCheckpoint, match="has no good checkpoint") as error:
            Checkpointer(tmp_path, keep=2).latest_step()
        assert error.value.problems == [second, first]


def test_every_flipped_bit_is_found(tmp_path: pathlib.Path) -> None:
    run_of(tmp_path, (1,))
    generator = np.random.default_rng(0)
    files = [path for item in ("params", "opt_state", "data", "meta", "manifest")
             for path in (tmp_path / CHECKPOINTS / "1" / item).rglob("*")
             if path.is_file() and path.stat().st_size and path.parent.name != "manifest"]  # fmt: skip
    assert len(files) > 10
    for path in files:
        good = path.read_bytes()
        for at in generator.integers(0, len(good), 5):
            bad = bytearray(good)
            bad[at] ^= 1 << generator.integers(0, 8)
            path.write_bytes(bad)
            assert manifest.problems(tmp_path / CHECKPOINTS / "1") == [
                f"{path} is damaged: its checksum is another one"
            ]
        path.write_bytes(good)
    assert manifest.problems(tmp_path / CHECKPOINTS / "1") == []
    shares = [manifest.problems(tmp_path / CHECKPOINTS / "1", share=(i, 3)) for i in range(3)]
    assert shares == [[], [], []]


def test_what_is_kept(tmp_path: pathlib.Path) -> None:
    run_of(tmp_path, (2, 4, 6, 8, 10, 12), keep=2, keep_every=4)
    assert faults.steps(tmp_path) == [4, 8, 10, 12]


def test_a_kill_while_an_old_checkpoint_is_removed_leaves_no_half_of_one(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What has a number is whole at every moment; the rest of a removal is done at the next start."""
    removed, remove = [], shutil.rmtree

    def dies(path: pathlib.Path, **_: Any) -> None:
        removed.append(path.relative_to(tmp_path / CHECKPOINTS).as_posix())
        for file in path.glob("params/*"):
            remove(file) if file.is_dir() else file.unlink()
        numbered = faults.steps(tmp_path)
        assert 1 not in numbered and len(numbered) >= 2
        assert not any(manifest.problems(tmp_path / CHECKPOINTS / str(step)) for step in numbered)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", dies)
        run_of(tmp_path, (1, 2, 3), keep=2)
    left = f"{checkpoint.DELETED}/1"
    assert set(removed) == {left} and (tmp_path / CHECKPOINTS / left / "meta").exists()
    again = Checkpointer(tmp_path, keep=2)
    assert again.latest_step() == 3 and faults.steps(tmp_path) == [2, 3]
    save(again, 4)
    again.close()
    assert faults.steps(tmp_path) == [3, 4] and not list(
        (tmp_path / CHECKPOINTS / checkpoint.DELETED).iterdir()
    )


def test_a_failed_save_is_made_good_by_the_next(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpointer = Checkpointer(tmp_path, keep=2)
    save(checkpointer, 1)
    save(checkpointer, 2)
    checkpointer._finish(wait=None)
    ignored: list[Any] = []
    monkeypatch.setattr(checkpointer, "_hook", ignored.append)
    with small_files(1000):
        save(checkpointer, 3)
        checkpointer._finish(wait=None)
    assert not ignored, "Orbax's complaints about its event loop"
    (line,) = [
        r.getMessage() for r in caplog.records if r.name == checkpoint.__name__ and r.levelname == "ERROR"
    ]
    assert str(tmp_path / CHECKPOINTS / "3") in line and "could not be saved" in line
    assert "GB are free there: make room, lower config.checkpoint.keep" in line
    # Nothing half-written is in the way, and what was to be deleted for it is still there.
    assert faults.steps(tmp_path) == [1, 2] and faults.unfinished(tmp_path) == []
    save(checkpointer, 4)
    checkpointer.close()
    assert faults.steps(tmp_path) == [2, 4]
    again = Checkpointer(tmp_path, keep=2)
    assert again.latest_step() == 4
    np.testing.assert_array_equal(restored(again, 4)["a"]["w"], PARAMS["a"]["w"] + 4)


def test_a_needed_save_or_three_failed_ones_end_the_run(tmp_path: pathlib.Path) -> None:
    checkpointer = Checkpointer(tmp_path, keep=2)
    save(checkpointer, 1)
    checkpointer._finish(wait=None)
    with small_files(1000), pytest.raises(OSError, match=r"3 could not be saved.*started again"):
        save(checkpointer, 3, needed=True)
        checkpointer.close()
    with small_files(1000), pytest.raises(OSError, match=r"6 could not be saved.*started again"):
        checkpointer = Checkpointer(tmp_path, keep=2)
        for step in (4, 5, 6, 7):
            save(checkpointer, step)
    assert Checkpointer(tmp_path, keep=2).latest_step() == 1


def test_a_slow_save_does_not_hold_up_the_run(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    checkpointer = Checkpointer(tmp_path, keep=9, max_wait=0.1)
    disk, write = threading.Event(), manifest.write
    monkeypatch.setattr(manifest, "write", lambda *paths: disk.wait() and write(*paths))
    save(checkpointer, 1)
    save(checkpointer, 2)
    assert "step 2 is not saved: step 1 is still being written" in caplog.text
    threading.Timer(0.5, disk.set).start()
    save(checkpointer, 3, needed=True)
    checkpointer.close()
    assert faults.steps(tmp_path) == [1, 3]


# --- Steps that are not finite, and what reads a run ----------------------------------------------


def poisoned(monkeypatch: pytest.MonkeyPatch, steps: tuple[int, ...]) -> list[Any]:
    """Makes the loss of these calls of the train step NaN; lists (state before, batch, state after)."""
    compile_step, calls = loop.compile_step, []

    def compile_and_spoil(*arguments: Any) -> Any:
        train_step = compile_step(*arguments)

        def spoilt(trainable: Any, opt_state: Any, frozen: Any, batch: Any) -> Any:
            if len(calls) in steps:
                batch.loss_weights.block_until_ready()
                object.__setattr__(batch, "loss_weights", batch.loss_weights.at[0, 0].set(jnp.nan))
            before = jax.device_get((trainable, opt_state))
            results = train_step(trainable, opt_state, frozen, batch)
            calls.append((before, jax.device_get(batch), jax.device_get(results[:2])))
            assert train_step._cache_size() == 1
            return results

        return spoilt

    monkeypatch.setattr(loop, "compile_step", compile_and_spoil)
    return calls


def changed(call: Any) -> bool:
    before, _, after = call
    same = jax.tree.map(np.array_equal, before, after)
    return not all(jax.tree.leaves(same))


@pytest.fixture
def small_config(tiny_world: TinyWorld) -> Any:
    config = faults.run_config(os.fspath(tiny_world.tokenizer), os.fspath(tiny_world.captions))
    with config.unlocked():
        config.train.num_steps = 8
        config.checkpoint.every = 100
    return config


@pytest.mark.slow
def test_nonfinite_steps_change_nothing(
    small_config: Any,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    small_config.train.nonfinite_in_a_row = 3
    small_config.profile.update({"first_step": 1, "num_steps": 1})
    calls = poisoned(monkeypatch, (2, 3, 5))
    # Of what is only watched, nothing can be written: the run goes on, and says it once.
    watched = (f".{goodput.FILE_NAME}.{os.getpid()}.partial", first_batch.FILE_NAME, profiler.DIRECTORY)
    for name in watched[:2]:
        (tmp_path / name).mkdir()
    (tmp_path / watched[2]).touch()
    loop.train(small_config, tmp_path)
    (tmp_path / watched[2]).unlink()
    with contextlib.suppress(RuntimeError):  # JAX 0.10 keeps a trace that it could not write.
        jax.profiler.stop_trace()
    said = [message for message in caplog.messages if "can't be written" in message]
    assert len(said) == 3, said
    for name in (goodput.FILE_NAME, *watched[1:]):
        assert any(message.startswith(f"{tmp_path / name} can't be written (") for message in said), name
    # The first step's learning rate is 0, but not its moments.
    assert [changed(call) for call in calls] == [i not in (2, 3, 5) for i in range(8)]
    assert [line["nonfinite"] for line in logged(tmp_path)] == [0, 0, 1, 1, 0, 1, 0, 0]
    assert logged(tmp_path)[-1]["skipped_steps"] == 3
    assert read_meta(tmp_path)["skipped_steps"] == 3
    assert not (tmp_path / "nonfinite").exists()
    # Who only reads the model is told of damage as well, and of the checkpoint that is good.
    shutil.copytree(tmp_path / CHECKPOINTS / "8", tmp_path / CHECKPOINTS / "7")
    said = flip(tmp_path / CHECKPOINTS / "8")
    with pytest.raises(manifest.DamagedCheckpoint) as error:
        load_run(tmp_path)
    advice = f"step 7 is good; to use it, move {tmp_path / CHECKPOINTS / '8'} away"
    assert error.value.problems[0] == said and error.value.problems[1].startswith(advice)
    load_run(tmp_path, 7)
    with pytest.raises(manifest.DamagedCheckpoint, match="its checksum is another one"):
        next(iter(open_run(tmp_path).tensors.values())).read()


@pytest.mark.slow
def test_stop_at_the_first_nonfinite_step(
    small_config: Any, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_config.train.nonfinite = "stop"
    with monkeypatch.context() as patch:
        calls = poisoned(patch, (2,))
        with pytest.raises(
            NonFinite, match=r"step 2 is not finite \(loss nan.*step_00000002: look at the samp"
        ):
            loop.train(small_config, tmp_path)
    # Two steps were under way when it was seen.
    assert len(calls) == 5 and not changed(calls[2]) and faults.steps(tmp_path) == [5]
    path = tmp_path / "nonfinite" / "step_00000002" / "process_0-of-1.npz"
    batch = load_batch(path)
    jax.tree.map(np.testing.assert_array_equal, batch, calls[2][1])
    about = json.loads(path.with_suffix(".json").read_text())
    assert (about["step"], about["loss"]) == (2, "nan")
    assert [len(row) for row in about["rows"]] == batch.segment_ids.max(1).tolist()
    # The images named are the images in it.
    assert all(
        sample["source"] == "share_captioner" and sample["id"] for row in about["rows"] for sample in row
    )
    # The same command goes on behind it.
    loop.train(small_config, tmp_path)
    assert faults.steps(tmp_path)[-1] == 8 and read_meta(tmp_path)["skipped_steps"] == 1


# --- Kills ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_killed_twenty_times_it_ends_with_the_same_bits(
    tiny_world: TinyWorld, tmp_path: pathlib.Path, record_property: Any
) -> None:
    """By SIGKILL, most of them inside of a save; and four times its newest checkpoint was damaged."""
    environment = {**os.environ, "PYTHONPATH": os.fspath(REPOSITORY)}
    command = [sys.executable, "-m", "tests.train.faults", f"--tokenizer={tiny_world.tokenizer}"]
    command += [f"--dataset={tiny_world.captions}", f"--output={tmp_path}", "--kills=20"]
    done = subprocess.run(command, env=environment, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    story = json.loads((tmp_path / "story.json").read_text())
    record_property("story", story)
    lives = story["lives"]
    assert len(lives) == 20 and {life["phase"] for life in lives} == set(faults.PHASES)
    assert sum(bool(life["unfinished"]) for life in lives) >= 5, "kills inside of a save"
    damaged = [life for life in lives if "damaged" in life]
    assert damaged
    assert len(list((tmp_path / "killed" / checkpoint.DAMAGED).iterdir())) >= 1
    assert faults.compare(tmp_path) > 80
