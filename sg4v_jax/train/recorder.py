"""The numbers of a run: counted as steps go by, read from the device and written when they are due."""

import contextlib
import dataclasses
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import jax
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from sg4v_jax.data.batch import MODALITIES, Batch, kind_names
from sg4v_jax.models.flops import model_flops
from sg4v_jax.parallel.peaks import peak_flops
from sg4v_jax.train import first_batch, goodput, groups, metrics, writers
from sg4v_jax.train.profiler import ProfilerWindow
from sg4v_jax.train.setup import Setup
from sg4v_jax.train.timeline import DATA, SAVE, STEP, Timeline

# What other numbers are made of. All else that a step returns is written as it is.
_RAW = ("kind_losses", "kind_tokens", "image_features", "pairs")


class Writer(Protocol):
    """Takes the numbers of one step."""

    def write(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


@dataclasses.dataclass(frozen=True)
class _Shapes:
    """Of a batch: positions, and slots for images."""

    positions: int
    slots: int


class Recorder:
    """Numbers of the steps, by all processes together, written by the main one. See docs/metrics.md.

    Attributes:
      latest: what was written last.
    """

    def __init__(
        self,
        workdir: pathlib.Path,
        config: ConfigDict,
        setup: Setup,
        timeline: Timeline,
        first_step: int,
        num_steps: int,
    ):
        """Args:
        workdir: of the run.
        config: of the run.
        setup: see `train.setup`.
        timeline: begun when the run was.
        first_step, num_steps: the steps to do are those from the one to below the other.
        """
        self._config, self._setup, self._workdir = config, setup, workdir
        self._timeline, self._first_step, self._num_steps = timeline, first_step, num_steps
        self._kinds = kind_names(config.data.sources)
        multipliers = groups.assign(setup.shapes, config.optim.groups)
        trained = {path for path, multiplier in multipliers.items() if multiplier is not None}
        self._flops = model_flops(setup.model, setup.shapes, trained)
        self._peak = config.metrics.peak_flops or peak_flops(jax.devices()[0].device_kind)
        self._main = jax.process_index() == 0
        self._console = writers.Console(config.stage, first_step, num_steps) if self._main else None
        self._writers = self._open() if self._main else []
        self._goodput = goodput.Goodput(workdir / goodput.FILE_NAME, first_step) if self._main else None
        traced = config.profile.num_steps if self._main else 0
        self._profiler = ProfilerWindow(workdir, config.profile.first_step, traced, timeline)
        self._outages = metrics.Outages()
        self._window: list[dict[str, Any]] = []
        self._shapes = _Shapes(0, 0)
        # Of the timeline when the window began.
        self._from_steps, self._from_seconds = 0, dict(timeline.seconds)
        self.latest: dict[str, float] = {}

    def steps(self) -> Iterator[int]:
        """The steps to do, in front of whoever watches."""
        for step in self._console or range(self._first_step, self._num_steps):
            with self._profiler.around(step):
                yield step
        self._profiler.stop()

    def waiting(self, what: str) -> contextlib.AbstractContextManager[None]:
        """Around what the loop does between steps: `data`, `save`, `eval`."""
        return self._timeline.waiting(what)

    def see(self, step: int, batch: Batch, tokenizer: Any) -> None:
        """Looks at a batch before its step; of a run's first one it writes down what is in it."""
        images = batch.images
        self._shapes = _Shapes(batch.tokens.size, images.shape[0] * images.shape[1])
        if step == 0 and self._main:
            features = self._setup.model.vision.num_image_tokens
            with self._outages.survived(self._workdir / first_batch.FILE_NAME, "it is left out"):
                first_batch.write(self._workdir, batch, tokenizer, features)

    def add(self, values: dict[str, Any]) -> None:
        """Counts a step whose metrics, and whatever else is to be written of it, may not be there yet."""
        self._timeline.handed_over(values["loss"])
        self._window.append(values)

    def log(self, step: int, skipped: int, validation: Mapping[str, float], *, now: bool = False) -> None:
        """Reads and writes the numbers of the steps since the last line, if they are due.

        Args:
          step: the last of them.
          skipped: records that this process has left out so far.
          validation: what `train.validation` found after the step; if anything, they are due.
          now: whether they are due in any case.
        """
        if now or validation or (step + 1) % self._config.train.log_every == 0:
            # Reading a number waits for the device, so it happens only here.
            window = jax.device_get(self._window)
            self._timeline.settle()
            self._write(step, window, skipped, validation)
            self._window.clear()
            self._from_steps, self._from_seconds = self._timeline.steps, dict(self._timeline.seconds)
            self._timeline.durations.clear()

    def saved(self, step: int) -> None:
        """Says that there is a checkpoint of `step` steps."""
        self._timeline.settle()
        if self._goodput:
            self._goodput.write(step, self._timeline.seconds, saved=True)

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Ends what is written, when the last checkpoint is complete or something has failed.

        Then nothing waits for the device: it may wait itself, for a process that is gone. What was
        written stays, and a trace is ended, or there could be no other one in this process.
        """
        if kind is not None:
            self._profiler.stop(wait=False)
            if self._console:
                self._console.close()
            return
        self._profiler.stop()
        if self._timeline.steps:
            self._timeline.settle()
            if self._goodput:
                self._goodput.write(self._first_step + self._timeline.steps, self._timeline.seconds)
        self._timeline.close()
        for writer in self._writers:
            writer.close()

    def _open(self) -> list[Writer]:
        config, first_step = self._config, self._first_step
        opened: list[Writer] = [metrics.MetricsFile(self._workdir / metrics.FILE_NAME, first_step)]
        if self._console:
            opened.append(self._console)
        if first_step == self._num_steps:
            return opened  # Nothing left to do.
        if config.metrics.tensorboard:
            opened.append(writers.TensorBoard(self._workdir, first_step))
        if config.metrics.wandb_project:
            fields = config.to_dict()
            opened.append(writers.WeightsAndBiases(self._workdir, config.metrics.wandb_project, fields))
        return opened

    def _write(
        self, step: int, window: list[dict[str, Any]], skipped: int, validation: Mapping[str, float]
    ) -> None:
        memory = memory_in_use()
        # What differs between processes. All come by here after the same step.
        data = self._timeline.seconds[DATA] - self._from_seconds[DATA]
        own = np.array([skipped, data, *memory.values()], np.float64)
        skips, waited, *most = _over_processes(own)
        memory = dict(zip(memory, most, strict=True))
        values = {
            **self._of_step(step, window[-1]),
            **losses_by_kind(window, self._kinds),
            **validation,
            "skipped_records": int(skips),
            **self._speed(window, float(waited)),
            **{f"memory/{name}": float(value) for name, value in memory.items()},
        }
        if self._goodput:
            self._goodput.write(step + 1, self._timeline.seconds)
            values |= {f"goodput/{cause}_seconds": s for cause, s in self._goodput.seconds.items()}
            values["goodput/share"] = self._goodput.share
        self.latest = values
        for writer in self._writers:
            writer.write(step, values)
        if self._main and step - len(window) + 1 == 0:
            loss, pretrained = float(window[0]["loss"]), bool(self._config.init.text)
            with self._outages.survived(self._workdir / first_batch.FILE_NAME, "its last line is left out"):
                first_batch.add_loss(self._workdir, loss, self._setup.model.text.vocab_size, pretrained)

    def _of_step(self, step: int, last: dict[str, Any]) -> dict[str, float]:
        """Numbers of the step itself: the same whenever it is logged, and after a restart."""
        rate = float(self._setup.schedule(step))
        rates = {
            f"learning_rate/{regex}": rate * multiplier
            for regex, multiplier in self._config.optim.groups
            if multiplier is not None
        }
        images = self._images(last)
        return {
            **{name: np.asarray(value).item() for name, value in last.items() if name not in _RAW},
            "learning_rate": rate,
            **rates,
            "images": images,
            "padding_share": 1 - int(last["tokens"]) / self._shapes.positions,
            "empty_slot_share": 1 - images / self._shapes.slots if self._shapes.slots else 0.0,
        }

    def _speed(self, window: list[dict[str, Any]], waited: float) -> dict[str, float]:
        """Speeds since the last line, saving and evaluating left out."""
        now, before = self._timeline, self._from_seconds
        steps = now.steps - self._from_steps
        seconds = now.seconds[STEP] + now.seconds[DATA] - before[STEP] - before[DATA]
        chips = jax.device_count()
        tokens = sum(int(step["tokens"]) for step in window) / seconds
        samples = sum(int(step["samples"]) for step in window) / seconds
        flops = sum(
            self._flops.of(self._images(step), int(step["tokens"]), int(step["pairs"])) for step in window
        )
        values = {
            "step_seconds": seconds / steps,
            "slowest_step_seconds": max(now.durations),
            "save_seconds": now.seconds[SAVE] - before[SAVE],
            "data_wait_share": waited / seconds,
            "tokens_per_second": tokens,
            "tokens_per_second_per_chip": tokens / chips,
            "samples_per_second": samples,
            "samples_per_second_per_chip": samples / chips,
            "model_flops_per_second_per_chip": flops / seconds / chips,
        }
        if self._peak:
            values["mfu"] = values["model_flops_per_second_per_chip"] / self._peak
        return {f"speed/{name}": value for name, value in values.items()}

    def _images(self, values: dict[str, Any]) -> int:
        return int(values["image_features"]) // self._setup.model.vision.num_image_tokens


def losses_by_kind(window: list[dict[str, Any]], kinds: list[tuple[str, str]]) -> dict[str, float]:
    """Mean loss per supervised token of each source and each modality, over the steps of a window.

    A source none of whose samples came by is left out, and so are steps that were not finite.

    Args:
      window: metrics of the steps, with `kind_losses`, `kind_tokens` and `nonfinite`.
      kinds: see `data.batch.kind_names`.
    """
    finite = [step for step in window if not step["nonfinite"]]
    losses = sum((step["kind_losses"].astype(np.float64) for step in finite), np.zeros(len(kinds)))
    tokens = sum((step["kind_tokens"] for step in finite), np.zeros(len(kinds), np.int64))
    found = {}
    names = [("source", source) for source in dict.fromkeys(source for source, _ in kinds)]
    for axis, name in [*names, *(("modality", modality) for modality in MODALITIES)]:
        chosen = [(source if axis == "source" else modality) == name for source, modality in kinds]
        if count := tokens[chosen].sum():
            found[f"loss/{axis}/{name}"] = float(losses[chosen].sum() / count)
    return found


def memory_in_use() -> dict[str, float]:
    """Bytes of device memory in use, at the peak so far, and at most, of this process's fullest device.

    Empty where the devices don't say, as CPUs don't.
    """
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    names = {"in_use_bytes": "bytes_in_use", "peak_bytes": "peak_bytes_in_use", "limit_bytes": "bytes_limit"}
    found = {name: [each[key] for each in stats if key in each] for name, key in names.items()}
    return {name: float(max(values)) for name, values in found.items() if values}


def _over_processes(own: np.ndarray) -> np.ndarray:
    """Each process has [records skipped, other numbers ...]; the sum of the first, the maximum of others."""
    if jax.process_count() == 1:
        return own
    every = np.asarray(multihost_utils.process_allgather(own))
    return np.array([every[:, 0].sum(), *every[:, 1:].max(0)])
