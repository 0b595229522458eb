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

from sg4v_jax.models.config import ModelConfig
from sg4v_jax.models.sharegpt4v import abstract_model
from sg4v_jax.parallel.placement import param_shardings
from sg4v_jax.train import groups
from sg4v_jax.train.checkpoint import Checkpointer
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
    """Works out shapes and shardings of everything that a run of `config` keeps on devices."""
    optim = config.optim
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


def resume_or_start(
    setup: Setup, config: ConfigDict, checkpointer: Checkpointer, batches: grain.DatasetIterator
) -> tuple[int, Params, Any, Params]:
    """The newest checkpoint's state, or a fresh one.

    Args:
      setup: see `set_up`.
      config: the run's config.
      checkpointer: of the run.
      batches: the batch iterator, which is moved to where the checkpoint was taken.

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
        params, opt_state = checkpointer.restore(first_step, shapes, opt_shapes, batches)
        trainable, frozen = groups.split(params, config.optim.groups)
    else:
        sources = config.init.to_dict()
        params = initial_params(setup.model, sources, setup.shapes, setup.shardings, config.seed)
        trainable, frozen = groups.split(params, config.optim.groups)
        opt_state = jax.jit(setup.optimizer.init, out_shardings=setup.opt_shardings)(trainable)
    return first_step, trainable, opt_state, frozen


def compile_step(setup: Setup, config: ConfigDict) -> TrainStep:
    """The jitted train step of the run; it donates the trainable parameters and the optimizer state."""
    step = make_train_step(
        setup.graphdef,
        setup.optimizer,
        compute_dtype=jnp.dtype(config.train.compute_dtype),
        remat=config.train.remat,
        loss_chunk=config.train.loss_chunk,
        accumulate=config.train.accumulate,
        reduction=config.train.loss_reduction,
    )
    trainable_shardings, _ = groups.split(setup.shardings, config.optim.groups)
    out_shardings = (trainable_shardings, setup.opt_shardings, None)
    return jax.jit(step, donate_argnums=(0, 1), out_shardings=out_shardings)


def _with_shardings(shapes: Any, shardings: Any) -> Any:
    return jax.tree.map(lambda s, sh: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sh), shapes, shardings)
