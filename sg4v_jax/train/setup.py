"""What a run consists of before its first step: shapes, shardings, optimizer, initial or resumed state."""

import dataclasses
import logging
from typing import Any

import grain
import jax
import jax.numpy as jnp
import optax
from flax import nnx
from ml_collections import ConfigDict

from sg4v_jax.data.batch import kind_names
from sg4v_jax.data.loader import LoaderConfig
from sg4v_jax.data.mixture import Replacement, Source
from sg4v_jax.data.sample import SampleFormat
from sg4v_jax.data.tokenizer import Tokenizer
from sg4v_jax.models.config import ModelConfig
from sg4v_jax.models.sharegpt4v import abstract_model
from sg4v_jax.parallel.compiler import compiler_options
from sg4v_jax.parallel.placement import param_shardings
from sg4v_jax.parallel.rules import ways
from sg4v_jax.train import groups
from sg4v_jax.train.checkpoint import Checkpointer, Resharded
from sg4v_jax.train.initial import initial_params, with_dtypes
from sg4v_jax.train.optimizer import make_optimizer, state_shardings, warmup_cosine
from sg4v_jax.train.step import Params, TrainStep, make_train_step

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Setup:
    """A run as shapes; nothing of it holds memory on a device.

    Attributes:
      model: the model's shapes.
      graphdef: its structure.
      shapes, shardings: of all parameters.
      schedule: learning rate by step.
      optimizer: see `train.optimizer`.
      opt_shapes, opt_shardings: of the optimizer's state.
    """

    model: ModelConfig
    graphdef: nnx.GraphDef
    shapes: Any
    shardings: Any
    schedule: optax.Schedule
    optimizer: optax.GradientTransformation
    opt_shapes: Any
    opt_shardings: Any


def set_up(config: ConfigDict, model: ModelConfig, mesh: jax.sharding.Mesh, num_steps: int) -> Setup:
    """Works out shapes and shardings of everything that a run of `config` keeps on devices.

    Raises:
      ValueError: the rows of a batch don't divide among the devices.
    """
    optim = config.optim
    rows, parts, accumulate = config.data.batch_size, ways("batch", mesh), config.train.accumulate
    if rows % (parts * accumulate):
        raise ValueError(
            f"config.data.batch_size={rows} rows don't divide by {parts} (mesh slices x data x fsdp) times "
            f"config.train.accumulate={accumulate}; change the batch, or use more of mesh.tensor"
        )
    graphdef, shapes, axes = abstract_model(model)
    shapes = with_dtypes(shapes, optim.groups, jnp.dtype(config.train.compute_dtype))
    shardings = param_shardings(shapes, axes, mesh)
    trainable, _ = groups.split(shapes, optim.groups)
    trainable_shardings, _ = groups.split(shardings, optim.groups)
    schedule = warmup_cosine(optim.learning_rate, optim.warmup_ratio, num_steps)
    optimizer = make_optimizer(
        trainable,
        optim.groups,
        schedule=schedule,
        b1=optim.b1,
        b2=optim.b2,
        eps=optim.eps,
        weight_decay=optim.weight_decay,
        clip_norm=optim.clip_norm,
    )
    return Setup(
        model=model,
        graphdef=graphdef,
        shapes=shapes,
        shardings=shardings,
        schedule=schedule,
        optimizer=optimizer,
        opt_shapes=jax.eval_shape(optimizer.init, trainable),
        opt_shardings=state_shardings(optimizer, trainable, trainable_shardings, mesh),
    )


def model_config(config: ConfigDict, tokenizer: Tokenizer) -> ModelConfig:
    """The model of a run, which must have room for the tokenizer's pieces."""
    model = ModelConfig.from_dict(config.model.to_dict())
    if tokenizer.vocab_size > model.text.vocab_size:
        raise ValueError(
            f"{tokenizer.path} has {tokenizer.vocab_size} pieces but config.model.text.vocab_size is "
            f"{model.text.vocab_size}"
        )
    return model


def loader_config(config: ConfigDict, model: ModelConfig) -> LoaderConfig:
    """The loader's part of a run's config.

    Raises:
      ValueError: if a directory is missing or a value is not possible; the message names the field.
    """
    data = config.data
    for name, source in data.sources.items():
        required(source.directory, f"config.data.sources.{name}.directory")
    form = SampleFormat(
        template=data.template,
        aspect=data.aspect,
        prompt=data.prompt,
        image_size=model.vision.image_size,
        image_tokens=model.vision.num_image_tokens,
        length=data.seq_len,
        image_slots=data.image_slots,
        max_tokens=data.max_tokens,
        too_long=data.too_long,
    )
    replace = data.replace
    if replace.share:
        required(replace.directory, "config.data.replace.directory")
    return LoaderConfig(
        sources={name: Source(**source) for name, source in data.sources.items()},
        form=form,
        batch_size=data.batch_size,
        packing=data.packing,
        packing_window=data.packing_window,
        seed=config.seed,
        num_threads=data.num_threads,
        num_workers=data.num_workers,
        prefetch=data.prefetch,
        worker_timeout=data.worker_timeout,
        replacement=Replacement(**replace) if replace.share else None,
    )


def required(value: str | None, name: str) -> str:
    """The value of a field that has no default.

    Raises:
      ValueError: if it was not set.
    """
    if not value:
        raise ValueError(f"{name} is not set; give --{name}=PATH")
    return value


def resume_or_start(
    setup: Setup,
    config: ConfigDict,
    checkpointer: Checkpointer,
    batches: grain.DatasetIterator,
    resharded: Resharded,
) -> tuple[int, Params, Any, Params]:
    """The newest checkpoint's state, or a fresh one.

    Args:
      setup: see `set_up`.
      config: the run's config.
      checkpointer: of the run.
      batches: the batch iterator, which is moved to where the checkpoint was taken.
      resharded: its state, from those of another number of processes.

    Returns:
      (steps already done, trainable parameters, optimizer state, frozen parameters).

    Raises:
      ValueError: the workdir holds a converted model, or `config.init` doesn't fit `config.model`.
    """
    latest, first_step = checkpointer.latest_step(), 0
    if latest == 0:
        raise ValueError(
            "the workdir holds a converted model, not a run: train in another, and start from this one "
            "with --config.init.vision, --config.init.projector and --config.init.text"
        )
    if latest is not None:
        first_step = latest
        log.info("resuming at step %d", first_step)
        shapes = _with_shardings(setup.shapes, setup.shardings)
        opt_shapes = _with_shardings(setup.opt_shapes, setup.opt_shardings)
        params, opt_state = checkpointer.restore(first_step, shapes, opt_shapes, batches, resharded)
        trainable, frozen = groups.split(params, config.optim.groups)
    else:
        sources = config.init.to_dict()
        params = initial_params(setup.model, sources, setup.shapes, setup.shardings, config.seed)
        trainable, frozen = groups.split(params, config.optim.groups)
        opt_state = jax.jit(setup.optimizer.init, out_shardings=setup.opt_shardings)(trainable)
    return first_step, trainable, opt_state, frozen


def compile_step(setup: Setup, config: ConfigDict) -> TrainStep:
    """The jitted train step of the run; it donates the trainable parameters and the optimizer state.

    Raises:
      ValueError: `config.train.compiler_options` isn't of its form.
    """
    step = make_train_step(
        setup.graphdef,
        setup.optimizer,
        compute_dtype=jnp.dtype(config.train.compute_dtype),
        remat=config.train.remat,
        loss_chunk=config.train.loss_chunk,
        accumulate=config.train.accumulate,
        reduction=config.train.loss_reduction,
        kinds=len(kind_names(config.data.sources)),
    )
    trainable_shardings, _ = groups.split(setup.shardings, config.optim.groups)
    device = jax.tree.leaves(setup.shardings)[0].mesh.devices.flat[0]
    return jax.jit(
        step,
        donate_argnums=(0, 1),
        out_shardings=(trainable_shardings, setup.opt_shardings, None),
        compiler_options=compiler_options(device, config.train.compiler_options),
    )


def _with_shardings(shapes: Any, shardings: Any) -> Any:
    return jax.tree.map(lambda s, sh: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sh), shapes, shardings)
