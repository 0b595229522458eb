"""Training, top to bottom: mesh, data, model, optimizer, resume, loop."""

import json
import logging
import math
import os
import pathlib
import shutil
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import tqdm
from ml_collections import ConfigDict

from sg4v_jax.convert.orbax import FORMAT_VERSION, TOKENIZER
from sg4v_jax.data.batch import to_devices
from sg4v_jax.data.loader import Loader, LoaderConfig, Source
from sg4v_jax.data.sample import SampleFormat
from sg4v_jax.data.tokenizer import Tokenizer
from sg4v_jax.models.config import ModelConfig
from sg4v_jax.models.sharegpt4v import abstract_model
from sg4v_jax.parallel.mesh import make_mesh
from sg4v_jax.parallel.placement import param_shardings
from sg4v_jax.train import groups, metrics
from sg4v_jax.train.checkpoint import Checkpointer
from sg4v_jax.train.initial import initial_params, with_dtypes
from sg4v_jax.train.optimizer import make_optimizer, state_shardings, warmup_cosine
from sg4v_jax.train.step import make_train_step

log = logging.getLogger(__name__)


def train(config: ConfigDict, workdir: str | os.PathLike[str]) -> dict[str, float]:
    """Runs a stage, or goes on with one that was cut off.

    Args:
      config: see `configs/common.py`.
      workdir: where checkpoints, metrics and the config go. If it holds a checkpoint, the run
        resumes from it and ends with the same weights as if it had never stopped.

    Returns:
      The metrics of the last logged step.
    """
    workdir = pathlib.Path(workdir)
    main_process = jax.process_index() == 0

    # --- Mesh, tokenizer, data -------------------------------------------------------------------
    mesh = make_mesh(**config.mesh)
    tokenizer = Tokenizer(_required(config.data.tokenizer, "config.data.tokenizer"))
    model_config = _model_config(config, tokenizer)
    loader = Loader(loader_config(config, model_config), tokenizer)
    num_steps = config.train.num_steps or math.ceil(loader.steps_per_epoch() * config.train.num_epochs)
    batches = iter(loader)

    with jax.set_mesh(mesh):
        # --- Model and optimizer, as shapes first ------------------------------------------------
        compute_dtype = jnp.dtype(config.train.compute_dtype)
        graphdef, shapes, axes = abstract_model(model_config)
        shapes = with_dtypes(shapes, config.optim.groups, compute_dtype)
        shardings = param_shardings(shapes, axes, mesh)
        schedule = warmup_cosine(config.optim.learning_rate, config.optim.warmup_ratio, num_steps)
        trainable_shapes, _ = groups.split(shapes, config.optim.groups)
        optimizer = make_optimizer(
            trainable_shapes,
            config.optim.groups,
            schedule=schedule,
            b1=config.optim.b1,
            b2=config.optim.b2,
            eps=config.optim.eps,
            weight_decay=config.optim.weight_decay,
            clip_norm=config.optim.clip_norm,
        )
        trainable_shardings, _ = groups.split(shardings, config.optim.groups)
        opt_shapes = jax.eval_shape(optimizer.init, trainable_shapes)
        opt_shardings = state_shardings(optimizer, trainable_shapes, trainable_shardings, mesh)

        # --- Resume this run, or start from given parts and random values ------------------------
        checkpointer = Checkpointer(workdir, keep=config.checkpoint.keep)
        first_step = checkpointer.latest_step() or 0
        if first_step:
            params, opt_state = checkpointer.restore(
                first_step,
                _with_shardings(shapes, shardings),
                _with_shardings(opt_shapes, opt_shardings),
                batches,
            )
            log.info("resuming %s at step %d", workdir, first_step)
            trainable, frozen = groups.split(params, config.optim.groups)
        else:
            params = initial_params(model_config, config.init.to_dict(), shapes, shardings, config.seed)
            trainable, frozen = groups.split(params, config.optim.groups)
            opt_state = jax.jit(optimizer.init, out_shardings=opt_shardings)(trainable)
        del params  # The step donates its parts; nothing else may hold them.
        if main_process:
            _write_run_files(workdir, config, tokenizer)
            _log_summary(trainable, frozen, num_steps, loader.num_records)

        # --- The step ----------------------------------------------------------------------------
        step_fn = make_train_step(
            graphdef,
            optimizer,
            compute_dtype=compute_dtype,
            remat=config.train.remat,
            loss_chunk=config.train.loss_chunk,
            accumulate=config.train.accumulate,
            reduction=config.train.loss_reduction,
        )
        out_shardings = (trainable_shardings, opt_shardings, None)
        train_step = jax.jit(step_fn, donate_argnums=(0, 1), out_shardings=out_shardings)

        # --- Loop --------------------------------------------------------------------------------
        metrics_file = metrics.MetricsFile(workdir / "metrics.jsonl", first_step) if main_process else None
        meta = _meta(config, model_config, tokenizer)
        steps = tqdm.trange(
            first_step,
            num_steps,
            initial=first_step,
            total=num_steps,
            desc=config.stage,
            disable=not (main_process and sys.stderr.isatty()),
        )
        values: dict[str, float] = {}
        window_start, window_tokens = time.perf_counter(), 0.0
        for step in steps:
            batch = to_devices(next(batches), mesh)
            trainable, opt_state, step_metrics = train_step(trainable, opt_state, frozen, batch)
            done = step + 1
            window_tokens += batch.tokens.size
            if done % config.train.log_every == 0 or done == num_steps:
                # Reading a number waits for the device, so it happens only here.
                values = {name: float(value) for name, value in step_metrics.items()}
                now = time.perf_counter()
                values |= {
                    "learning_rate": float(schedule(step)),
                    "positions_per_second": window_tokens / (now - window_start),
                    "skipped_records": loader.skipped.total,
                }
                window_start, window_tokens = now, 0.0
                if metrics_file:
                    metrics_file.write(step, values)
                steps.set_postfix(loss=f"{values['loss']:.3f}")
            if done % config.checkpoint.every == 0 or done == num_steps:
                params = groups.merge(trainable, frozen)
                checkpointer.save(done, params, opt_state, batches, meta | {"step": done})
                del params
        checkpointer.close()
        if metrics_file:
            metrics_file.close()
    if loader.skipped.total:
        log.warning("skipped records: %s", json.dumps(loader.skipped.summary()))
    return values


def loader_config(config: ConfigDict, model: ModelConfig) -> LoaderConfig:
    """The loader's part of a run's config."""
    data = config.data
    sources = {
        name: Source(_required(source.directory, f"config.data.sources.{name}.directory"), source.weight)
        for name, source in data.sources.items()
    }
    form = SampleFormat(
        template=data.template,
        aspect=data.aspect,
        prompt=data.prompt,
        image_size=model.vision.image_size,
        image_tokens=model.vision.num_image_tokens,
        length=data.seq_len,
        image_slots=data.image_slots,
    )
    return LoaderConfig(
        sources=sources,
        form=form,
        batch_size=data.batch_size,
        packing=data.packing,
        packing_bins=data.packing_bins,
        seed=config.seed,
        num_threads=data.num_threads,
    )


def _model_config(config: ConfigDict, tokenizer: Tokenizer) -> ModelConfig:
    model = ModelConfig.from_dict(config.model.to_dict())
    if tokenizer.vocab_size > model.text.vocab_size:
        raise ValueError(
            f"{tokenizer.path} has {tokenizer.vocab_size} pieces but config.model.text.vocab_size is "
            f"{model.text.vocab_size}"
        )
    return model


def _required(value: str | None, name: str) -> str:
    if not value:
        raise ValueError(f"{name} is not set; give --{name}=PATH")
    return value


def _with_shardings(shapes: Any, shardings: Any) -> Any:
    return jax.tree.map(lambda s, sh: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sh), shapes, shardings)


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


def _log_summary(trainable: Any, frozen: Any, num_steps: int, num_records: int) -> None:
    log.info(
        "%s trainable and %s frozen parameters; %d steps over %d records",
        f"{groups.count(trainable):,}",
        f"{groups.count(frozen):,}",
        num_steps,
        num_records,
    )
