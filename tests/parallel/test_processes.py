"""Jobs of several real processes (virtual CPU devices, gloo): the same loss, checkpoints and files as one.

A notice of preemption to one of two processes is in tests/launch/test_story.py.
"""

import contextlib
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pytest

from sg4v_jax.__main__ import main
from sg4v_jax.convert.orbax import CHECKPOINTS
from sg4v_jax.parallel.shares import interleave
from sg4v_jax.train import first_batch, goodput, metrics, writers
from sg4v_jax.world import WorldFiles
from tests.conftest import TinyWorld
from tests.parallel.test_distributed import free_port
from tests.tiny import small_argv

REPOSITORY = pathlib.Path(__file__).parents[2]
STEPS, RESUMED_AT = 4, 2
# One sample a row: packed, each reader packs its own, and rows are others for another number of readers.
CONFIG = {
    "model.vision.num_layers": 3,
    "model.vision.tuned_from": 1,
    "data.packing": False,
    "data.batch_size": 4,
    "train.num_steps": STEPS,
    "checkpoint.every": RESUMED_AT,
    "checkpoint.keep": STEPS,
    "validation.every": RESUMED_AT,
    "validation.num_records": 6,  # A batch and a half: of two readers one has no row of the second.
}


def train_argv(world: TinyWorld, workdir: pathlib.Path, **mesh: int) -> list[str]:
    meshed = {f"mesh.{axis}": size for axis, size in mesh.items()}
    return small_argv(world, workdir, CONFIG | meshed | {"validation.directory": world.captions})


class Said(NamedTuple):
    """What a process printed, and what it opened to write, as far as Python knows."""

    out: str
    err: str
    written: set[pathlib.Path]
    """Files that appear whole are here under their names, not under that of their making."""

    def below(self, directory: pathlib.Path) -> list[pathlib.Path]:
        """What it wrote there."""
        inside = (path for path in self.written if path.is_relative_to(directory))
        return sorted(path.relative_to(directory) for path in inside)


SCRIPT = """
import json, os, sys
from sg4v_jax.__main__ import main
written = []
def note(event, arguments):
    if event == "open" and isinstance(arguments[0], (str, os.PathLike)):
        if (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            written.append(os.path.abspath(arguments[0]))
sys.addaudithook(note)
for argv in json.loads(sys.argv[1]):
    main(argv)
print(*written, sep="\\n", file=open(sys.argv[2], "w"))
"""


def run_processes(commands: Sequence[list[str]], count: int, devices: int, **environment: str) -> list[Said]:
    """Runs `sg4v` commands one after the other in each of `count` processes."""
    base = {name: value for name, value in os.environ.items() if not name.startswith("SG4V_")}
    base |= {"PYTHONPATH": os.fspath(REPOSITORY), "JAX_PLATFORMS": "cpu", "SG4V_JOIN_TIMEOUT": "600"}
    base |= {"JAX_NUM_CPU_DEVICES": str(devices), "SG4V_NUM_PROCESSES": str(count)} | environment
    base["SG4V_COORDINATOR"] = f"localhost:{free_port()}"
    with contextlib.ExitStack() as stack:
        # Not pipes: all of them write, and one is read after the other.
        folder = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
        running, said = [], []
        for index in range(count):
            own = base | {"SG4V_PROCESS_ID": str(index)}
            files = [stack.enter_context((folder / f"{index}.{name}").open("w+")) for name in ("out", "err")]
            command = [sys.executable, "-c", SCRIPT, json.dumps(commands), f"{folder}/{index}.written"]
            process = subprocess.Popen(command, env=own, cwd=REPOSITORY, stdout=files[0], stderr=files[1])
            stack.callback(process.kill)
            running.append(process)
        codes = [process.wait() for process in running]
        errors = [(folder / f"{index}.err").read_text() for index in range(count)]
        assert codes == [0] * count, "\n".join(err[-2000:] for err in errors)
        for index, err in enumerate(errors):
            lines = (folder / f"{index}.out").read_text().splitlines(keepends=True)
            names = (folder / f"{index}.written").read_text().splitlines()
            written = (pathlib.Path(re.sub(r"/\.([^/]+)\.\d+\.partial$", r"/\1", name)) for name in names)
            out = "".join(line for line in lines if "peer ranks" not in line)
            said.append(Said(out, err, set(written)))
    return said


def losses(workdir: pathlib.Path) -> list[float]:
    """Of all steps, then held out."""
    lines = metrics.read(workdir / metrics.FILE_NAME)
    assert [line["step"] for line in lines] == list(range(STEPS))
    held_out = [line["validation/loss"] for line in lines if (line["step"] + 1) % RESUMED_AT == 0]
    return [line["loss"] for line in lines] + held_out


@pytest.fixture(scope="module")
def alone(tiny_world: TinyWorld, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A run of this process, on one device."""
    workdir = tmp_path_factory.mktemp("alone")
    main(train_argv(tiny_world, workdir))
    return workdir


@pytest.mark.slow
def test_training(alone: pathlib.Path, tiny_world: TinyWorld, tmp_path: pathlib.Path) -> None:
    """Four processes, of which two each hold the same rows; from the middle two go on, on another mesh."""
    four, two = tmp_path / "four", tmp_path / "two"
    watched = [*train_argv(tiny_world, four, fsdp=2, tensor=2), "--config.metrics.tensorboard=True"]
    said = run_processes([watched], 4, 1, JAX_LOG_COMPILES="1")
    np.testing.assert_allclose(losses(four), losses(alone), rtol=1e-5)
    assert f"{four}: done, loss" in said[0].out and "trainable and" in said[0].err
    # The others write nothing but their part of checkpoints, and of what they do they say nothing.
    names = {path.parts[0] for path in said[0].below(four)}
    expected = {metrics.FILE_NAME, goodput.FILE_NAME, first_batch.FILE_NAME, writers.TENSORBOARD}
    assert names > expected | {"config.json"}
    for other in said[1:]:
        assert other.out == "" and "trainable and" not in other.err and "used" not in other.err
        assert {path.parts[0] for path in other.below(four)} <= {CHECKPOINTS}
    for _, err, _ in said:
        assert err.count("Finished XLA compilation of jit(train_step)") == 1
        assert err.count("Finished XLA compilation of jit(loss)") == 1

    shutil.copytree(four, two)
    shutil.rmtree(two / CHECKPOINTS / str(STEPS))
    said = run_processes([train_argv(tiny_world, two, fsdp=4)], 2, 2)
    assert f"resuming at step {RESUMED_AT}" in said[0].err
    np.testing.assert_allclose(losses(two), losses(alone), rtol=1e-5)
    assert losses(two)[:RESUMED_AT] == losses(four)[:RESUMED_AT]


@pytest.mark.slow
def test_evaluating_and_captioning(
    alone: pathlib.Path, tiny_world: TinyWorld, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each process works on its own devices on its share; the files are those of one process."""
    files = WorldFiles.below(tiny_world.directory)
    questions = files.heldout_questions.read_text().splitlines(keepends=True)[:5]
    (tmp_path / "questions.jsonl").write_text("".join(questions))
    images = sorted(p.relative_to(files.image_root) for p in files.image_root.glob("photos/*.jpg"))
    (tmp_path / "images.json").write_text(json.dumps([os.fspath(path) for path in images]))
    (tmp_path / "data").mkdir()
    (tmp_path / "data/world").symlink_to(tiny_world.directory)
    model = [f"--model={alone}", "--dtype=float32", "--max-new-tokens=6"]

    def commands(output: pathlib.Path) -> list[list[str]]:
        ask = [f"--questions={tmp_path}/questions.jsonl", f"--images={files.image_root}"]
        listed = [f"--images={tmp_path}/images.json", f"--image-root={files.image_root}", "--shard-size=1"]
        return [
            ["eval", *model, *ask, f"--output={output}/answers.jsonl", f"--truth={files.heldout_answers}"],
            ["eval", *model, "--benchmarks=world", f"--data={tmp_path}/data", "--limit=5",
             f"--output={output}/scores"],
            ["caption", *model, *listed, f"--output={output}/captions"],
        ]  # fmt: skip

    one, two = tmp_path / "one", tmp_path / "two"
    for argv in commands(one):
        main(argv)
    expected = capsys.readouterr().out
    (first, second) = run_processes(commands(two), 2, 2)
    # The second writes its answers and captions, of which the first makes the rest. Who comes first describes
    # the run.
    own = ("captions/work", "scores/world/answers-001-of-002.", "scores/world/run.json")
    assert second.out == "" and all(os.fspath(path).startswith(own) for path in second.below(two))
    made = {os.fspath(path).partition(".")[0] for path in first.below(two)}
    assert made > {"answers", "scores/world/scores", "scores/world/samples"}
    same = [line for line in expected.splitlines() if str(one) not in line]
    assert len(same) > 3 and set(same) <= set(first.out.splitlines())
    for name in ("answers.jsonl", "scores/world/samples.jsonl", "captions/captions.json"):
        assert (two / name).read_bytes() == (one / name).read_bytes(), name
    journals = sorted((two / "scores/world").glob("answers-*.jsonl"))
    assert [len(path.read_text().splitlines()) for path in journals] == [3, 2]


def test_interleave() -> None:
    items = list(range(7))
    for count in (1, 2, 3, 8):
        assert interleave([items[i::count] for i in range(count)]) == items
