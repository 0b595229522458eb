"""Training, top to bottom: mesh, data, model and optimizer, resume, loop."""

import contextlib
import json
import logging
import math
import os
import pathlib
import shutil
import sys
import time
from collections.abc import Iterable
from typing import Any

import jax
import tqdm
from ml_collections import ConfigDict

from sg4v_jax.convert.orbax import FORMAT_VERSION, TOKENIZER
from sg4v_jax.data.loader import Counts, Loader, dropped
from sg4v_jax.data.tokenizer import Tokenizer
from sg4v_jax.models.config import ModelConfig
from sg4v_jax.parallel.mesh import make_mesh, row_shard
from sg4v_jax.train import groups, metrics
from sg4v_jax.train.checkpoint import Checkpointer
from sg4v_jax.train.preemption import Preempted, PreemptionNotice
from sg4v_jax.train.setup import (
    Setup,
    compile_step,
    loader_config,
    model_config,
    required,
    resume_or_start,
    set_up,
)

log = logging.getLogger(__name__)


def train(config: ConfigDict, workdir: str | os.PathLike[str]) -> dict[str, float]:
    """Runs a stage, or goes on with one that was cut off.

    Args:
      config: see `configs/common.py`.
      workdir: where checkpoints, metrics and the config go. If it holds a checkpoint, the run
        resumes from it and ends with the same weights as if it had never stopped.

    Returns:
      The metrics of the last logged step; none if there was nothing left to do.

    Raises:
      Preempted: a process got SIGTERM, and all have saved and stopped after the same step.
    """
    workdir = pathlib.Path(workdir)
    mesh = make_mesh(**config.mesh)
    tokenizer = Tokenizer(required(config.data.tokenizer, "config.data.tokenizer"))
    model = model_config(config, tokenizer)
    loader = Loader(loader_config(config, model), tokenizer, row_shard(mesh))
    num_steps = config.train.num_steps or math.ceil(loader.steps_per_epoch() * config.train.num_epochs)

    with (
        jax.set_mesh(mesh),
        contextlib.closing(loader.on_devices(mesh)) as batches,
        PreemptionNotice() as notice,
    ):
        setup = set_up(config, model, mesh, num_steps)
        checkpointer = Checkpointer(workdir, keep=config.checkpoint.keep)
        first_step, trainable, opt_state, frozen = resume_or_start(
            setup, config, checkpointer, batches, loader.resharded
        )
        train_step = compile_step(setup, config)
        if jax.process_index() == 0:
            _write_run_files(workdir, config, tokenizer)
            _log_summary(trainable, frozen, num_steps, loader.num_records)
        recorder = _Recorder(workdir, config, setup, first_step)
        meta, preempted = _meta(config, model, tokenizer), False

        for step in _progress(config.stage, first_step, num_steps):
            batch = next(batches)
            trainable, opt_state, step_metrics = train_step(trainable, opt_state, frozen, batch)
            last = step + 1 == num_steps
            counts = batches.get_state()["counts"]
            recorder.add(step, step_metrics, batch.tokens.size, dropped(counts), log_now=last)
            preempted = not last and notice.reached(step + 1)
            if last or preempted or (step + 1) % config.checkpoint.every == 0:
                params = groups.merge(trainable, frozen)
                checkpointer.save(step + 1, params, opt_state, batches, meta | {"step": step + 1})
                del params  # The next step donates its leaves; nothing else may hold them.
            if preempted:
                break
        checkpointer.close()
        _log_counts(batches.get_state()["counts"])
    if preempted:
        log.warning(
            "told to stop: saved step %d of %d; the same command goes on from it", step + 1, num_steps
        )
        raise Preempted
    return recorder.latest


class _Recorder:
    """Numbers of the steps, on the main process to `metrics.jsonl`."""

    def __init__(self, workdir: pathlib.Path, config: ConfigDict, setup: Setup, first_step: int):
        self._every, self._schedule = config.train.log_every, setup.schedule
        main = jax.process_index() == 0
        self._file = metrics.MetricsFile(workdir / metrics.FILE_NAME, first_step) if main else None
        self._start, self._positions = time.perf_counter(), 0
        self.latest: dict[str, float] = {}

    def add(
        self, step: int, values: dict[str, jax.Array], positions: int, skipped: int, *, log_now: bool
    ) -> None:
        """Counts a step; reads and writes its numbers when they are due."""
        self._positions += positions
        if not log_now and (step + 1) % self._every:
            return
        # Reading a number waits for the device, so it happens only here.
        self.latest = {name: float(value) for name, value in values.items()}
        now = time.perf_counter()
        self.latest |= {
            "learning_rate": float(self._schedule(step)),
            "positions_per_second": self._positions / (now - self._start),
            "skipped_records": skipped,
        }
        self._start, self._positions = now, 0
        if self._file:
            self._file.write(step, self.latest)


def _progress(stage: str, first_step: int, num_steps: int) -> Iterable[int]:
    """Steps to do, behind a progress bar where somebody watches."""
    hidden = jax.process_index() > 0 or not sys.stderr.isatty()
    steps = range(first_step, num_steps)
    return tqdm.tqdm(steps, initial=first_step, total=num_steps, desc=stage, disable=hidden)


def _meta(config: ConfigDict, model: ModelConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "format_version": FORMAT_VERSION,
        "stage": config.stage,
        "model": model.to_dict(),
        "template": config.data.template,
        "aspect": config.data.aspect,
        "prompt": config.data.prompt,
        "tokenizer_sha256": tokenizer.sha256,
        "config": json.loads(config.to_json_best_effort()),
    }


def _write_run_files(workdir: pathlib.Path, config: ConfigDict, tokenizer: Tokenizer) -> None:
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / "config.json").write_text(config.to_json_best_effort(indent=2))
    if not (workdir / TOKENIZER).exists():
        shutil.copyfile(tokenizer.path, workdir / TOKENIZER)


def _log_counts(counts: Counts) -> None:
    """What this process read of each source, what it cut and what it left out, and why."""
    for name, source in counts.items():
        log.info("%s: %s", name, ", ".join(f"{n:,} {what}" for what, n in source.items()))


def _log_summary(trainable: Any, frozen: Any, num_steps: int, num_records: int) -> None:
    log.info(
        "%s trainable and %s frozen parameters; %d steps over %d records",
        f"{groups.count(trainable):,}",
        f"{groups.count(frozen):,}",
        num_steps,
        num_records,
    )
