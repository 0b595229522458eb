"""AdamW with the original's schedule, and a learning rate per group of parameters."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

from sg4v_jax.train import groups as groups_lib


def warmup_cosine(peak: float, warmup_ratio: float, num_steps: int) -> optax.Schedule:
    """Linear 0 -> peak over ceil(ratio * steps), then half a cosine to 0 (spec 4.3).

    The first step has rate 0, as in the original: its schedule starts at zero.
    """
    warmup = math.ceil(warmup_ratio * num_steps)

    def schedule(step: Array | int) -> Array:
        progress = (step - warmup) / max(1, num_steps - warmup)
        cosine = 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip(progress, 0, 1)))
        return peak * jnp.where(step < warmup, step / max(1, warmup), cosine)

    return schedule


def make_optimizer(
    trainable: dict[str, Any],
    groups: groups_lib.Groups,
    *,
    schedule: optax.Schedule,
    b1: float,
    b2: float,
    eps: float,
    weight_decay: float,
    clip_norm: float,
) -> optax.GradientTransformation:
    """The optimizer of all stages.

    Args:
      trainable: parameters (or their shapes) that train.
      groups: regex groups with learning-rate multipliers.
      schedule: learning rate by step, before the multipliers.
      b1, b2, eps: AdamW's constants; the original's are 0.9, 0.999, 1e-8.
      weight_decay: decoupled decay; biases and norm scales are exempt.
      clip_norm: global norm that gradients are clipped to; 0 is off, as in effect in the original
        (its DeepSpeed configuration sets no clipping, spec 4.3).
    """
    multipliers = groups_lib.multiplier_tree(trainable, groups)
    # Matrices decay; biases and norm scales (their last path part) don't.
    decays = groups_lib.unflatten(
        {path: path.rsplit("/", 1)[-1] not in ("bias", "scale") for path, _ in groups_lib.flatten(trainable)}
    )
    return optax.chain(
        optax.clip_by_global_norm(clip_norm) if clip_norm else optax.identity(),
        optax.scale_by_adam(b1=b1, b2=b2, eps=eps),
        optax.add_decayed_weights(weight_decay, mask=decays) if weight_decay else optax.identity(),
        optax.scale_by_learning_rate(schedule),
        optax.stateless(lambda updates, _: jax.tree.map(jnp.multiply, updates, multipliers)),
    )


def state_shardings(
    optimizer: optax.GradientTransformation, trainable: Any, shardings: Any, mesh: jax.sharding.Mesh
) -> Any:
    """Shardings of the optimizer state: each moment lies like its parameter.

    Left to itself, jit would replicate the moments on every device.
    """
    shapes = jax.eval_shape(optimizer.init, trainable)
    everywhere = NamedSharding(mesh, PartitionSpec())
    return optax.tree_map_params(
        optimizer,
        lambda _, sharding: sharding,
        shapes,
        shardings,
        transform_non_params=lambda _: everywhere,
    )
