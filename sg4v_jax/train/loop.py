"""Training, top to bottom: mesh, data, model and optimizer, resume, loop."""

import contextlib
import json
import logging
import math
import os
import pathlib
from typing import Any

import jax
from ml_collections import ConfigDict

from sg4v_jax import atomic
from sg4v_jax.convert.orbax import FORMAT_VERSION, TOKENIZER, read_meta
from sg4v_jax.data.loader import Counts, Loader, dropped
from sg4v_jax.data.tokenizer import Tokenizer
from sg4v_jax.models.config import ModelConfig
from sg4v_jax.parallel.mesh import make_mesh, row_shard
from sg4v_jax.train import groups
from sg4v_jax.train.checkpoint import Checkpointer
from sg4v_jax.train.nonfinite import NonFinite, NonFiniteSteps
from sg4v_jax.train.preemption import Preempted, PreemptionNotice
from sg4v_jax.train.recorder import Recorder
from sg4v_jax.train.setup import (
    compile_step,
    loader_config,
    model_config,
    required,
    resume_or_start,
    set_up,
)
from sg4v_jax.train.timeline import DATA, EVAL, SAVE, Timeline
from sg4v_jax.train.validation import Validation

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
      NonFinite: too many steps had a loss or gradients that are NaN or infinite; state saved.
      DamagedCheckpoint: there are checkpoints, and none is good.
      OSError: the last save failed, or too many in a row.
    """
    timeline = Timeline()
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
        contextlib.ExitStack() as stack,
    ):
        setup = set_up(config, model, mesh, num_steps)
        validation = Validation(config, setup, tokenizer, mesh, num_steps)
        checkpointer = Checkpointer(workdir, **_checkpoint_options(config))
        first_step, trainable, opt_state, frozen = resume_or_start(
            setup, config, checkpointer, batches, loader.resharded
        )
        train_step = compile_step(setup, config)
        if jax.process_index() == 0:
            _write_run_files(workdir, config, tokenizer)
            _log_summary(trainable, frozen, num_steps, loader.num_records)
        recorder = stack.enter_context(Recorder(workdir, config, setup, timeline, first_step, num_steps))
        meta, preempted = _meta(config, model, tokenizer), False
        skipped = NonFiniteSteps(
            config.train, workdir, loader, read_meta(workdir, first_step) if first_step else {}
        )

        data_state = batches.get_state()
        for step in recorder.steps():
            with recorder.waiting(DATA):
                batch = next(batches)
            recorder.see(step, batch, tokenizer)
            trainable, opt_state, step_metrics = train_step(trainable, opt_state, frozen, batch)
            last = step + 1 == num_steps
            given_up = skipped.add(step, step_metrics, batch, data_state)
            data_state = batches.get_state()
            recorder.add({**step_metrics, "skipped_steps": skipped.total})
            found: dict[str, float] = {}
            if validation.due(step + 1):
                with recorder.waiting(EVAL):
                    found = validation(trainable, frozen)
            recorder.log(step, dropped(data_state["counts"]), found, now=last)
            preempted = not last and notice.reached(step + 1)
            if last or preempted or given_up or (step + 1) % config.checkpoint.every == 0:
                given_up = skipped.finish() or given_up
                params = groups.merge(trainable, frozen)
                about = meta | skipped.counts | {"step": step + 1}
                needed = last or preempted or given_up
                with recorder.waiting(SAVE):
                    checkpointer.save(step + 1, params, opt_state, batches, about, needed=needed)
                recorder.saved(step + 1)
                del params  # The next step donates its leaves; nothing else may hold them.
            if preempted or given_up:
                break
        with recorder.waiting(SAVE):
            checkpointer.close()
        _log_counts(batches.get_state()["counts"])
    if skipped.error:
        raise NonFinite(skipped.error)
    if preempted:
        log.warning(
            "told to stop: saved step %d of %d; the same command goes on from it", step + 1, num_steps
        )
        raise Preempted
    return recorder.latest


def _checkpoint_options(config: ConfigDict) -> dict[str, Any]:
    every, keep_every = config.checkpoint.every, config.checkpoint.keep_every
    if every < 1 or config.checkpoint.keep < 1:
        raise ValueError("config.checkpoint.every and config.checkpoint.keep must be at least 1")
    if keep_every % every:
        raise ValueError(
            f"config.checkpoint.keep_every={keep_every} is no multiple of config.checkpoint.every={every}: "
            "hardly any checkpoint would have such a step"
        )
    return {name: config.checkpoint[name] for name in ("keep", "keep_every", "max_wait")}


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
    atomic.write(workdir / "config.json", config.to_json_best_effort(indent=2))
    if not (workdir / TOKENIZER).exists():
        atomic.write(workdir / TOKENIZER, pathlib.Path(tokenizer.path).read_bytes())


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
