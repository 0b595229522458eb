"""A run that was killed, or told to stop, ends with the same bits as one that was never disturbed.

Two processes, of which one is told, are in tests/launch/test_story.py.
"""

import functools
import json
import os
import pathlib
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import pytest
from ml_collections import ConfigDict

from sg4v_jax import config as configs
from sg4v_jax.convert.orbax import CHECKPOINTS, load_run, read_meta
from sg4v_jax.data import build, defects
from sg4v_jax.train import groups, loop, metrics
from sg4v_jax.train.loop import train
from sg4v_jax.train.preemption import Preempted
from tests.conftest import TinyWorld

STEPS, KILLED_IN = 6, 4
REPOSITORY = pathlib.Path(__file__).parents[2]

# (packing, threads and worker processes that decode, config file, dataset, steps between checkpoints)
CASES = {
    "one sample a row": (False, 1, 0, "configs/finetune.py:tiny", "mix", 2),
    "packed, by a worker": (True, 2, 1, "configs/pretrain.py:tiny", "captions", 1),
}


def run_config(case: str, world: TinyWorld) -> ConfigDict:
    packing, threads, workers, spec, dataset, every = CASES[case]
    source = "sft_mix" if dataset == "mix" else "share_captioner"
    small = {"hidden_size": 32, "intermediate_size": 48, "num_layers": 3, "num_heads": 2}
    overrides = {f"model.{part}.{name}": size for part in ("vision", "text") for name, size in small.items()}
    return configs.load(
        spec,
        **overrides,
        **{
            "model.text.num_kv_heads": 1,
            "model.vision.image_size": 24,
            "model.vision.patch_size": 12,
            "model.vision.tuned_from": 1 if "pretrain" in spec else 2,
            f"data.sources.{source}.directory": os.fspath(getattr(world, dataset)),
            "data.tokenizer": os.fspath(world.tokenizer),
            "data.packing": packing,
            "data.packing_window": 8,
            "data.num_threads": threads,
            "data.num_workers": workers,
            "data.seq_len": 192,
            "data.image_slots": 2,
            "data.batch_size": 4,
            "data.template": "plain" if "pretrain" in spec else "v1",
            "train.num_steps": STEPS,
            "train.log_every": 1,
            "train.loss_chunk": 64,
            "checkpoint.every": every,
            "checkpoint.keep": STEPS,
        },
    )


def saved(workdir: pathlib.Path, step: int) -> dict[str, dict[str, np.ndarray]]:
    """Parameters and optimizer state of a checkpoint, as they lie on the disk."""
    path = (workdir / CHECKPOINTS / str(step) / "opt_state").resolve()
    # As numpy arrays: it may have been saved by more processes and devices than there are here.
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        leaves = checkpointer.metadata(path).item_metadata.tree
        as_numpy = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in leaves}
        opt_state = checkpointer.restore(path, args=ocp.args.PyTreeRestore(restore_args=as_numpy))
    return {
        "params": dict(groups.flatten(load_run(workdir, step).params)),
        "opt_state": {name: np.asarray(leaf) for name, leaf in opt_state.items()},
    }


def logged(workdir: pathlib.Path) -> list[dict[str, Any]]:
    lines = metrics.read(workdir / "metrics.jsonl")
    measured = metrics.MEASURED
    return [{name: v for name, v in line.items() if not name.startswith(measured)} for line in lines]


def train_and_die(case: str, world: TinyWorld, workdir: pathlib.Path) -> None:
    """Trains in a process that kills itself, as SIGKILL from outside would, in the midst of a step.

    At that moment the checkpoints of the steps before are being written in the background.
    """
    script = f"""
import os, pathlib, signal
from tests.conftest import TinyWorld
from tests.train import test_resume
from sg4v_jax.train.metrics import MetricsFile

write = MetricsFile.write
def write_or_die(self, step, values):
    if step == {KILLED_IN}:
        os.kill(os.getpid(), signal.SIGKILL)
    write(self, step, values)
MetricsFile.write = write_or_die

world = TinyWorld(*map(pathlib.Path, {[os.fspath(path) for path in vars(world).values()]!r}))
test_resume.train(test_resume.run_config({case!r}, world), {os.fspath(workdir)!r})
"""
    environment = {**os.environ, "PYTHONPATH": os.fspath(REPOSITORY)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr[-3000:]


def same_end(ours: pathlib.Path, theirs: pathlib.Path) -> None:
    """Asserts that two runs wrote the same lines and ended with the same bits."""
    assert [line["step"] for line in logged(ours)] == list(range(STEPS))
    assert logged(ours) == logged(theirs)
    found, expected = saved(ours, STEPS), saved(theirs, STEPS)
    for item, leaves in expected.items():
        assert leaves.keys() == found[item].keys()
        for name, leaf in leaves.items():
            np.testing.assert_array_equal(found[item][name], leaf, err_msg=f"{item} {name}")


Undisturbed = Callable[[str], tuple[pathlib.Path, dict[str, float]]]


@pytest.fixture(scope="module")
def undisturbed(tiny_world: TinyWorld, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """By case, the directory of a run that nothing happened to, and what it returned."""

    @functools.cache
    def run(case: str) -> tuple[pathlib.Path, dict[str, float]]:
        workdir = tmp_path_factory.mktemp("undisturbed")
        return workdir, train(run_config(case, tiny_world), workdir)

    return run


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_killed_run_resumes_to_the_bit(
    case: str, undisturbed: Undisturbed, tiny_world: TinyWorld, tmp_path: pathlib.Path
) -> None:
    calm, expected = undisturbed(case)
    train_and_die(case, tiny_world, tmp_path)
    steps = sorted(int(path.name) for path in (tmp_path / CHECKPOINTS).iterdir() if path.name.isdigit())
    # The newest may or may not have been finished in time; the one before it was.
    assert steps and steps[-1] in (2, 3, 4), steps
    assert [line["step"] for line in logged(tmp_path)] == list(range(KILLED_IN))
    # A last line that was cut off, and one of a step that will be repeated, must do no harm.
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(f'{{"step": {KILLED_IN}, "loss": 0}}\n{{"step": {KILLED_IN + 1}, "lo')
    found = train(run_config(case, tiny_world), tmp_path)
    assert found["loss"] == expected["loss"]
    same_end(tmp_path, calm)
    start, end = (dict(groups.flatten(load_run(calm, step).params)) for step in (steps[0], STEPS))
    assert any(not np.array_equal(start[name], leaf) for name, leaf in end.items())


@pytest.mark.slow
def test_told_to_stop(undisturbed: Undisturbed, tiny_world: TinyWorld, tmp_path: pathlib.Path) -> None:
    """SIGTERM: the step under way is finished and saved, between two regular checkpoints; the run exits."""
    case, told_in = "packed, by a worker", 3
    config = run_config(case, tiny_world)
    with config.unlocked():
        config.checkpoint.every = 1000
        config.data.num_workers = 0
    compile_step, calls = loop.compile_step, []

    def compile_and_tell(*arguments: Any) -> Any:
        train_step = compile_step(*arguments)

        def step_or_tell(*state: Any) -> Any:
            if len(calls) == told_in:
                os.kill(os.getpid(), signal.SIGTERM)
            calls.append(None)
            return train_step(*state)

        return step_or_tell

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Preempted):
        patch.setattr(loop, "compile_step", compile_and_tell)
        train(config, tmp_path)
    assert [int(path.name) for path in (tmp_path / CHECKPOINTS).iterdir()] == [told_in + 1]
    train(config, tmp_path)
    same_end(tmp_path, undisturbed(case)[0])


@pytest.mark.slow
def test_bad_record_is_skipped_and_counted(
    tiny_world: TinyWorld, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a finished run stays finished; its checkpoint says what it was."""
    good = sorted((tiny_world.image_root / "photos").iterdir())[0]
    images = tmp_path / "images"
    images.mkdir()
    (images / "good.jpg").write_bytes(good.read_bytes())
    (images / "cut.jpg").write_bytes(good.read_bytes()[:500])
    records = [
        {"id": str(i), "image": name, "conversations": [{"from": "human", "value": "<image>\nWhat?"},
                                                        {"from": "gpt", "value": "A cup."}]}
        for i, name in enumerate(["good.jpg", "cut.jpg", "good.jpg"])
    ]  # fmt: skip
    (tmp_path / "records.json").write_text(json.dumps(records))
    # The build would refuse the image; a disk that fails later does not ask.
    with monkeypatch.context() as patch:
        patch.setattr(defects, "inspect_image", lambda data, name, decode: [])
        dataset, report = build.build("bad", tmp_path / "records.json", images, tmp_path / "datasets")
    assert report.written == 3
    config = run_config("one sample a row", tiny_world)
    with config.unlocked():
        config.data.sources.sft_mix.directory = os.fspath(dataset)
        config.train.num_steps = 2
    workdir = tmp_path / "run"
    values = train(config, workdir)
    assert values["skipped_records"] >= 1
    assert metrics.read(workdir / "metrics.jsonl")[-1]["skipped_records"] == values["skipped_records"]
    before = (workdir / "metrics.jsonl").read_bytes()
    train(config, workdir)
    assert (workdir / "metrics.jsonl").read_bytes() == before
    meta = read_meta(workdir)
    assert (meta["step"], meta["stage"], meta["template"]) == (2, "finetune", "v1")
    assert meta["config"]["train"]["num_steps"] == 2
