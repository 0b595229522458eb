"""What a run writes down: one run of two sources, killed in its sixth step and gone on with."""

import dataclasses
import json
import pathlib
import re
import sys
import time
import types
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from sg4v_jax.convert.orbax import CHECKPOINTS
from sg4v_jax.data.tokenizer import Tokenizer
from sg4v_jax.models.flops import model_flops
from sg4v_jax.train import goodput, groups, loop, metrics, recorder
from sg4v_jax.train.setup import model_config, set_up
from tests.conftest import TinyWorld
from tests.train.events import scalars
from tests.train.test_resume import run_config

STEPS, EVERY, SAVED, KILLED_IN, VALIDATED = 8, 2, 3, 5, 5
# Of the run after the restart: the logged steps, and the steps that each line is of.
WINDOWS = {1: (0, 1), 3: (3,), 4: (4,), 5: (5,), 7: (6, 7)}
PEAK = 1e11
PROFILED = (5, 6)


class Killed(Exception):
    pass


class FakeWandb(types.ModuleType):
    """Notes what Weights & Biases is told."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.starts: list[dict[str, Any]] = []
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.finished = 0

    def init(self, **arguments: Any) -> "FakeWandb":
        self.starts.append(arguments)
        return self

    def log(self, values: dict[str, float], *, step: int) -> None:
        self.logged.append((step, values))

    def finish(self) -> None:
        self.finished += 1


@dataclasses.dataclass
class Run:
    """A finished run, and the truth about it.

    Attributes:
      first: what the killed start had written to `metrics.jsonl` and `goodput.json`.
      results: by step, what the step returned and the batch it got; of the start that counted.
    """

    workdir: pathlib.Path
    config: ConfigDict
    wandb: FakeWandb
    first: tuple[list[dict[str, Any]], dict[str, Any]]
    results: dict[int, tuple[dict[str, Any], Any]]
    lines: dict[int, dict[str, Any]]
    seconds: float


def mixture_config(world: TinyWorld) -> ConfigDict:
    config = run_config("one sample a row", world)
    with config.unlocked():
        config.data.sources.captions = config.data.sources.sft_mix.copy_and_resolve_references()
        config.data.sources.captions.directory = str(world.captions)
        config.data.packing = True
        config.train.num_steps = STEPS
        config.train.log_every = EVERY
        config.checkpoint.every = SAVED
        config.optim.groups = (("vision/.*", None), ("projector/.*", 0.5), (".*", 1.0))
        config.metrics.update({"tensorboard": True, "wandb_project": "share", "peak_flops": PEAK})
        # Due after the fifth step and the last; a line of its own where none is due.
        held_out = {"every": VALIDATED, "directory": str(world.mix), "num_records": 12}
        config.validation.update(held_out)
        config.profile.update({"first_step": PROFILED[0], "num_steps": len(PROFILED)})
    return config


@pytest.fixture(scope="module")
def run(tiny_world: TinyWorld, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    config, workdir = mixture_config(tiny_world), tmp_path_factory.mktemp("run")
    compile_step, results, wandb = loop.compile_step, {}, FakeWandb()
    begin, kill = [0], [True]

    def compile_and_note(*arguments: Any) -> Any:
        train_step = compile_step(*arguments)
        steps = iter(range(begin[0], STEPS))

        def step_or_die(*state: Any) -> Any:
            step = next(steps)
            if kill[0] and step == KILLED_IN:
                raise Killed
            batch = jax.device_get(state[3])
            new = train_step(*state)
            results[step] = jax.device_get(new[2]), batch
            return new

        return step_or_die

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "wandb", wandb)
        patch.setattr(loop, "compile_step", compile_and_note)
        patch.setattr(recorder, "memory_in_use", lambda: {"in_use_bytes": 2.0, "peak_bytes": 3.0})
        start = time.perf_counter()
        with pytest.raises(Killed):
            loop.train(config, workdir)
        while not (workdir / CHECKPOINTS / str(SAVED)).exists():
            time.sleep(0.01)  # Saved in the background.
        first = (
            metrics.read(workdir / metrics.FILE_NAME),
            json.loads((workdir / goodput.FILE_NAME).read_text()),
        )
        begin[0], kill[0] = SAVED, False
        loop.train(config, workdir)
        seconds = time.perf_counter() - start
    lines = {line["step"]: line for line in metrics.read(workdir / metrics.FILE_NAME)}
    yield Run(workdir, config, wandb, first, results, lines, seconds)


@pytest.mark.slow
def test_lines_say_what_the_steps_returned(run: Run) -> None:
    assert list(run.lines) == list(WINDOWS)
    for step, line in run.lines.items():
        values, batch = run.results[step]
        for name in ("loss", "accuracy", "grad_norm", "grad_norm/projector", "grad_norm/text"):
            assert line[name] == float(values[name]), name
        assert "grad_norm/vision" not in line  # It is frozen.
        towers = np.hypot(line["grad_norm/projector"], line["grad_norm/text"])
        np.testing.assert_allclose(line["grad_norm"], towers, rtol=1e-6)
        assert line["tokens"] == (batch.segment_ids > 0).sum()
        assert line["supervised_tokens"] == batch.loss_weights.sum()
        assert line["samples"] == batch.segment_ids.max(1).sum()
        filled = batch.images.any((2, 3, 4))
        assert line["images"] == filled.sum() > 0
        assert line["padding_share"] == 1 - (batch.segment_ids > 0).mean()
        assert line["empty_slot_share"] == 1 - filled.mean()
        assert line["learning_rate/projector/.*"] == line["learning_rate"] / 2
        assert line["learning_rate/.*"] == line["learning_rate"]
        assert "learning_rate/vision/.*" not in line


@pytest.mark.slow
def test_losses_by_source_and_modality(run: Run) -> None:
    """Parts of the loss: they add up to it, and each is of its own samples."""
    for step, window in WINDOWS.items():
        line = run.lines[step]
        batches = [run.results[s][1] for s in window]
        tokens = {"source/captions": 0, "source/sft_mix": 0, "modality/text": 0, "modality/image": 0}
        for batch in batches:
            for kind, name in enumerate([("captions", "text"), ("captions", "image"), ("sft_mix", "text"),
                                         ("sft_mix", "image")]):  # fmt: skip
                count = int(batch.loss_weights[batch.kinds == kind].sum())
                tokens[f"source/{name[0]}"] += count
                tokens[f"modality/{name[1]}"] += count
        total = sum(float(run.results[s][0]["loss"] * run.results[s][0]["supervised_tokens"]) for s in window)
        for axis in ("source", "modality"):
            parts = {name: n for name, n in tokens.items() if name.startswith(axis)}
            for name, n in parts.items():
                assert (f"loss/{name}" in line) == (n > 0)
            summed = sum(line[f"loss/{name}"] * n for name, n in parts.items() if n)
            np.testing.assert_allclose(summed, total, rtol=1e-5)
    assert all(f"loss/source/{name}" in run.lines[7] for name in ("captions", "sft_mix"))


@pytest.mark.slow
def test_speeds_follow_from_the_step_time(run: Run, tiny_world: TinyWorld) -> None:
    model = model_config(run.config, Tokenizer(tiny_world.tokenizer))
    setup = set_up(run.config, model, loop.make_mesh(**run.config.mesh), STEPS)
    trained = {path for path, _ in groups.flatten(groups.split(setup.shapes, run.config.optim.groups)[0])}
    flops = model_flops(model, setup.shapes, trained)
    for step, window in WINDOWS.items():
        line = run.lines[step]
        seconds = line["speed/step_seconds"] * len(window)
        batches = [run.results[s][1] for s in window]
        tokens = sum(int((batch.segment_ids > 0).sum()) for batch in batches)
        np.testing.assert_allclose(line["speed/tokens_per_second"], tokens / seconds)
        samples = sum(int(batch.segment_ids.max(1).sum()) for batch in batches)
        np.testing.assert_allclose(line["speed/samples_per_second_per_chip"], samples / seconds)
        images = sum(int(batch.images.any((2, 3, 4)).sum()) for batch in batches)
        lengths = [
            (row == n).sum() for b in batches for row in b.segment_ids for n in range(1, row.max() + 1)
        ]
        work = flops.of(images, tokens, sum(int(n * (n + 1) // 2) for n in lengths))
        np.testing.assert_allclose(line["speed/mfu"], work / seconds / PEAK)
        assert line["speed/slowest_step_seconds"] <= seconds + line["speed/save_seconds"] + 60
        assert 0 <= line["speed/data_wait_share"] <= 1


@pytest.mark.slow
def test_goodput_over_the_restart(run: Run) -> None:
    lines, killed = run.first
    assert [line["step"] for line in lines] == [1, 3, 4]
    state = json.loads((run.workdir / goodput.FILE_NAME).read_text())
    assert (state["starts"], state["step"]) == (2, STEPS)
    # What the killed start had logged after the checkpoint it is gone on with from.
    again = ("data", "step", "save", "eval", "profile")
    lost = sum(killed["seconds"][cause] - killed["saved"][str(SAVED)][cause] for cause in again)
    assert lost > 0
    np.testing.assert_allclose(state["seconds"]["lost"], lost)
    assert state["seconds"]["init"] > killed["seconds"]["init"] > 0
    assert state["seconds"]["profile"] > 0 < state["seconds"]["eval"]
    # Nothing twice: some of the time is left out, of what the killed start did not come to write.
    assert killed["seconds"]["init"] < sum(state["seconds"].values()) <= run.seconds
    last = run.lines[STEPS - 1]
    for cause in (*again, "init", "lost"):
        assert last[f"goodput/{cause}_seconds"] <= state["seconds"][cause]
    assert sorted(state["saved"]) == ["3", "6", "8"]


@pytest.mark.slow
def test_tensorboard_shows_the_lines(run: Run) -> None:
    shown = scalars(run.workdir / "tensorboard")
    for step, line in run.lines.items():
        for name, value in line.items():
            if name != "step":
                tag = re.sub(r"[^-/\w.]", "_", name)
                np.testing.assert_allclose(shown[tag][step], value, rtol=1e-6, err_msg=name)
    assert list(shown["loss"]) == list(run.lines)


@pytest.mark.slow
def test_wandb_goes_on_with_the_same_run(run: Run) -> None:
    first, second = run.wandb.starts
    assert first["id"] == second["id"] == (run.workdir / "wandb_id").read_text()
    assert (first["project"], second["resume"], first["dir"]) == ("share", "allow", str(run.workdir))
    assert first["config"]["stage"] == "finetune"
    assert [step for step, _ in run.wandb.logged] == [1, 3, 4, 3, 4, 5, 7]
    for step, values in run.wandb.logged[3:]:
        assert {"step": step, **values} == run.lines[step]
    assert run.wandb.finished == 1


@pytest.mark.slow
def test_profile_has_the_steps_asked_for(run: Run) -> None:
    # The kill came within the window: it ended that trace, or there could have been no other.
    cut, whole = sorted((run.workdir / "profile").rglob("*.xplane.pb"))
    assert cut.stat().st_size
    data = jax.profiler.ProfileData.from_file(str(whole))
    steps = [
        dict(event.stats)["step_num"]
        for plane in data.planes
        for line in plane.lines
        for event in line.events
        if event.name == "train"
    ]
    assert steps == list(PROFILED)


@pytest.mark.slow
def test_first_batch_is_written_down(run: Run) -> None:
    text = (run.workdir / "first_batch.txt").read_text()
    batch = run.results[0][1]
    assert text.startswith("The first batch has 4 rows of 192 tokens and 2 image slots.")
    assert text.count("ASSISTANT:«") >= batch.segment_ids.max(1).sum()
    assert text.count("[image in slot ") == batch.images.any((2, 3, 4)).sum()
    loss = float(run.results[0][0]["loss"])
    assert text.splitlines()[-1].startswith(f"loss of the first step: {loss:.3f}; guessing among 640 tokens")


@pytest.mark.slow
def test_the_page_names_every_number(run: Run) -> None:
    """docs/metrics.md has a row for each name that a run writes, and no other."""
    page = (pathlib.Path(__file__).parents[2] / "docs/metrics.md").read_text()
    rows = re.findall(r"^\| `([^`]+)` \| (\S.*?) \| \S.* \|$", page, re.MULTILINE)
    documented = {name: re.sub(r"[A-Z]+", "(.+)", re.escape(name)) for name, _ in rows}
    assert len(documented) == len(rows)
    # What is written where devices say what memory they have, and where the tower trains.
    written = {name for line in run.lines.values() for name in line}
    written |= {"memory/limit_bytes", "grad_norm/vision"}
    found = set()
    for name in written:
        fitting = [row for row, pattern in documented.items() if re.fullmatch(pattern, name)]
        assert len(fitting) == 1, f"{name}: {fitting}"
        found |= set(fitting)
    assert found == set(documented)
