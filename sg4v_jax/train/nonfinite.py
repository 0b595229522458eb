"""Steps whose loss or gradients are NaN or infinite: left out and counted, until there are too many.

The step itself leaves them out (`train.step`), so that no weight ever sees one. Here they are counted, on
the host, two steps later: by then the device is done with a step while it has the next ones to work on,
and nobody waits. All processes count the same steps at the same place.
"""

import collections
import dataclasses
import json
import logging
import os
import pathlib
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from sg4v_jax import atomic
from sg4v_jax.data.batch import Batch
from sg4v_jax.data.loader import Loader
from sg4v_jax.train.metrics import Outages

log = logging.getLogger(__name__)

POLICIES = ("skip", "stop")
DIRECTORY = "nonfinite"
_LAG = 2


class NonFinite(FloatingPointError):
    """Too many steps in a row were not finite; the run has saved its state and ends."""


@dataclasses.dataclass
class _Step:
    index: int
    metrics: dict[str, jax.Array]
    batch: Batch
    data_state: dict[str, Any]


class NonFiniteSteps:
    """Counts them, and writes the batch of the one that is too many to `WORKDIR/nonfinite`.

    Args:
      config: `config.train`, of which `nonfinite` is "skip" (up to `nonfinite_in_a_row` steps are left
        out, one after the other, before the run ends) or "stop" (it ends at the first).
      workdir: the run's directory.
      loader: knows which samples a batch has.
      counts: `skipped_steps` and `skipped_in_a_row`, from the `meta` of the checkpoint that a run
        resumes from.
    """

    def __init__(self, config: ConfigDict, workdir: pathlib.Path, loader: Loader, counts: dict[str, int]):
        if config.nonfinite not in POLICIES:
            raise ValueError(f"config.train.nonfinite {config.nonfinite!r} is not one of {POLICIES}")
        if config.nonfinite_in_a_row < 1:
            raise ValueError(
                f"config.train.nonfinite_in_a_row is {config.nonfinite_in_a_row}; it must be at least 1"
            )
        self._limit = 1 if config.nonfinite == "stop" else config.nonfinite_in_a_row
        self._directory, self._loader = workdir / DIRECTORY, loader
        self._waiting: collections.deque[_Step] = collections.deque()
        self.total, self._in_a_row = counts.get("skipped_steps", 0), counts.get("skipped_in_a_row", 0)
        self.error = ""

    @property
    def counts(self) -> dict[str, int]:
        """For the `meta` of a checkpoint; `finish` first."""
        return {"skipped_steps": self.total, "skipped_in_a_row": self._in_a_row}

    def add(
        self, index: int, metrics: dict[str, jax.Array], batch: Batch, data_state: dict[str, Any]
    ) -> bool:
        """Notes a step that was just begun, and looks at the one before the last.

        Args:
          index: of the step.
          metrics: of the step, still being computed.
          batch: what it trains on.
          data_state: of the batch iterator, before that batch.

        Returns:
          Whether the run has to end; `error` says why.
        """
        metrics["nonfinite"].copy_to_host_async()
        self._waiting.append(_Step(index, metrics, batch, data_state))
        return len(self._waiting) > _LAG and self._look(self._waiting.popleft())

    def finish(self) -> bool:
        """Looks at all steps so far, waiting for them; whether the run has to end."""
        over = [self._look(self._waiting.popleft()) for _ in range(len(self._waiting))]
        return any(over)

    def _look(self, step: _Step) -> bool:
        if not int(step.metrics["nonfinite"]):
            self._in_a_row = 0
            return False
        self.total, self._in_a_row = self.total + 1, self._in_a_row + 1
        shown = ", ".join(f"{name} {float(step.metrics[name])}" for name in ("loss", "grad_norm"))
        log.warning(
            "step %d is not finite (%s) and was left out: %d in a row, %d in all",
            *(step.index, shown, self._in_a_row, self.total),
        )
        if self._in_a_row < self._limit or self.error:
            return bool(self.error)
        path = self._write_batch(step)
        self.error = (
            f"step {step.index} is not finite ({shown}), number {self._in_a_row} in a row "
            "(config.train.nonfinite, config.train.nonfinite_in_a_row). No such step changed the weights, "
            f"and they are saved. The batch is in {path.parent}: look at the samples and at the learning "
            "rate. The same command goes on behind it"
        )
        return True

    def _write_batch(self, step: _Step) -> pathlib.Path:
        """This process's rows, and which samples are in them."""
        name = f"process_{jax.process_index()}-of-{jax.process_count()}"
        path = self._directory / f"step_{step.index:08d}" / f"{name}.npz"
        try:
            samples: Any = self._loader.samples(step.data_state)
        except Exception as error:  # It is only there to help; whatever is wrong with the data is said.
            samples = f"could not be read again: {error}"
        about = {"step": step.index, "rows": samples}
        # As strings: JSON has no NaN. Losses by kind are lists.
        about |= {name: np.asarray(value).astype(str).tolist() for name, value in step.metrics.items()}
        arrays: dict[str, Any] = {key: _local(leaf) for key, leaf in vars(step.batch).items()}
        with Outages().survived(path, "the batch is not kept"):  # Saving the state is what matters now.
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic.replacing(path) as file:
                np.savez_compressed(file, **arrays)
            atomic.write(path.with_suffix(".json"), json.dumps(about, indent=2) + "\n")
        return path


def load_batch(path: str | os.PathLike[str]) -> Batch:
    """A batch that was written to `WORKDIR/nonfinite`, as numpy arrays."""
    with np.load(path, allow_pickle=False) as arrays:
        return Batch(**arrays)


def _local(array: jax.Array) -> np.ndarray:
    """This process's rows of a batch."""
    parts = {shard.index[0].start or 0: shard.data for shard in array.addressable_shards}
    return np.concatenate([np.asarray(parts[start]) for start in sorted(parts)])
