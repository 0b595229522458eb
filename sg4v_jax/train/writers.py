"""Where a run's numbers go besides `metrics.jsonl`: TensorBoard, Weights & Biases, the terminal."""

import contextlib
import importlib
import logging
import math
import pathlib
import secrets
import sys
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any

import tqdm

from sg4v_jax.train import metrics

log = logging.getLogger(__name__)

TENSORBOARD, WANDB, WANDB_ID = "tensorboard", "wandb", "wandb_id"
_NO_LIMIT = 0


class TensorBoard:
    """Event files in `WORKDIR/tensorboard`, a tag for each number. Needs the extra `tensorboard`."""

    def __init__(self, workdir: pathlib.Path, first_step: int):
        module = _module("tensorboardX", "config.metrics.tensorboard", "tensorboard")
        self._directory, self._step = workdir / TENSORBOARD, first_step
        # What an earlier process wrote of steps that are now repeated is not shown. Of the queue: its thread
        # dies of the first write that fails, and whoever puts into one that is full then waits for ever.
        self._writer = module.SummaryWriter(
            str(self._directory), purge_step=first_step or None, max_queue=_NO_LIMIT
        )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes the numbers of one step; after a failure none, until the run is started again."""
        self._step = step
        if self._writer is not None:
            with self._survived():
                for name, value in values.items():
                    self._writer.add_scalar(name, value, step)
                self._writer.flush()

    def close(self) -> None:
        """Ends the file, which may show only now that it could not be written."""
        if self._writer is not None:
            with self._survived():
                self._writer.close()

    @contextlib.contextmanager
    def _survived(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            log.error(
                "%s can't be written (%s): make room there. TensorBoard gets nothing from step %d on, until "
                "the run is started again; %s has it all",
                *(self._directory, error.strerror, self._step, metrics.FILE_NAME),
            )
            self._writer = None


class WeightsAndBiases:
    """A run of a W&B project, which restarts go on with. Needs the extra `wandb`.

    Who it belongs to and whether it is sent at all is W&B's own to say: `wandb login`, WANDB_MODE=offline.
    """

    def __init__(self, workdir: pathlib.Path, project: str, config: dict[str, Any]):
        module = _module("wandb", "config.metrics.wandb_project", "wandb")
        file = workdir / WANDB_ID
        if not file.exists():
            file.write_text(secrets.token_hex(4))
        self._run = module.init(
            project=project, id=file.read_text(), resume="allow", dir=str(workdir), config=config
        )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Sends the numbers of one step, in the background."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """Waits until everything is sent."""
        self._run.finish()


class Console:
    """A progress bar where somebody watches, else a line in the log; both with the numbers that matter."""

    def __init__(self, stage: str, first_step: int, num_steps: int):
        self._stage, self._num_steps = stage, num_steps
        # Elsewhere a bar would fill a file.
        self._bar = tqdm.tqdm(
            range(first_step, num_steps),
            initial=first_step,
            total=num_steps,
            desc=stage,
            disable=not sys.stderr.isatty(),
        )

    def __iter__(self) -> Iterator[int]:
        return iter(self._bar)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Shows the numbers of one step."""
        left = (self._num_steps - step - 1) * values["speed/step_seconds"]
        text = (
            f"loss {values['loss']:.4f}"
            + (f" ({found:.4f} held out)" if (found := values.get("validation/loss")) else "")
            + f", {_short(values['speed/tokens_per_second'])} tokens/s"
            + (f", MFU {100 * values['speed/mfu']:.1f} %" if "speed/mfu" in values else "")
            + f", {tqdm.tqdm.format_interval(left)} left"
        )
        if self._bar.disable:
            log.info("%s %d/%d: %s", self._stage, step + 1, self._num_steps, text)
        else:
            self._bar.set_postfix_str(text)

    def close(self) -> None:
        """Ends the bar."""
        self._bar.close()


def _short(number: float) -> str:
    """`12.3k`, for where there is little room."""
    return tqdm.tqdm.format_sizeof(number) if math.isfinite(number) else str(number)


def _module(name: str, field: str, extra: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(f"{field} needs {name}: pip install 'sg4v_jax[{extra}]'") from error
