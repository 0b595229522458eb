"""The one train step of all stages: captioner, pre-training and SFT."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float

from sg4v_jax.data.batch import Batch
from sg4v_jax.kernels.cross_entropy import chunked_cross_entropy
from sg4v_jax.train import groups

Params = dict[str, Any]
Metrics = dict[str, Array]
TrainStep = Callable[[Params, Any, Params, Batch], tuple[Params, Any, Metrics]]

REDUCTIONS = ("token", "microbatch")


def cast(params: Params, dtype: jnp.dtype) -> Params:
    """The parameters in the compute dtype. Done before they are gathered, so that half the bytes move."""
    return jax.tree.map(lambda leaf: leaf.astype(dtype), params)


def normalize_weights(
    weights: Float[Array, "micro rows length"], reduction: str
) -> Float[Array, "micro rows length"]:
    """Scales loss weights so that the weighted sum of losses is the mean to minimise.

    Args:
      weights: supervision of each position, by microbatch.
      reduction: `token` weighs every supervised token of the global batch alike. `microbatch` is the
        mean of the microbatches' means, which is what the original computes (spec 3.1).
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"config.train.loss_reduction {reduction!r} is not one of {REDUCTIONS}")
    if reduction == "token":
        return weights / jnp.maximum(weights.sum(), 1)
    per_micro = weights.sum((1, 2), keepdims=True)
    return weights / jnp.maximum(per_micro, 1) / weights.shape[0]


def contents(batch: Batch) -> Metrics:
    """What a batch holds besides padding.

    Returns:
      `samples`, `tokens` (positions), `image_features` (positions that take one), and `pairs` of a query
      and a key that it sees, which are the work of attention.
    """
    filled = batch.segment_ids > 0
    return {
        "samples": (filled & (batch.positions == 0)).sum(),
        "tokens": filled.sum(),
        "image_features": (batch.image_index >= 0).sum(),
        # More than an int32 holds.
        "pairs": jnp.where(filled, batch.positions + 1, 0).astype(jnp.float32).sum(),
    }


def make_loss(
    graphdef: nnx.GraphDef, *, compute_dtype: jnp.dtype, remat: str, loss_chunk: int, kinds: int = 0
) -> Callable[[Params, Params, Batch], tuple[Array, Metrics]]:
    """`loss(trainable, frozen, batch) -> (weighted sum of losses, other sums)`.

    The other sums are `accuracy`, the weights of what was predicted right, and over the supervised
    tokens of each of `kinds` kinds `kind_losses`, their losses, and `kind_tokens`, their number.
    """

    def loss(trainable: Params, frozen: Params, batch: Batch) -> tuple[Array, Metrics]:
        model = nnx.merge(graphdef, cast(groups.merge(trainable, frozen), compute_dtype))
        hidden = model(
            batch.tokens, batch.positions, batch.segment_ids, batch.images, batch.image_index, remat
        )
        weights, counts = batch.loss_weights, batch.loss_weights > 0
        losses, correct = chunked_cross_entropy(
            hidden, batch.targets, counts, model.text.head.kernel[...], loss_chunk
        )
        # A sum, not a product of matrices: a TPU would round those to bfloat16.
        is_kind = counts & (batch.kinds == jnp.arange(kinds)[:, None, None])
        sums = {
            "accuracy": jnp.where(correct, weights, 0).sum(),
            "kind_losses": jnp.where(is_kind, losses, 0).sum((1, 2)),
            "kind_tokens": is_kind.sum((1, 2)),
        }
        return (losses * weights).sum(), sums

    return loss


def make_train_step(
    graphdef: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    *,
    compute_dtype: jnp.dtype,
    remat: str = "none",
    loss_chunk: int = 6400,
    accumulate: int = 1,
    reduction: str = "token",
    kinds: int = 0,
) -> TrainStep:
    """Builds `train_step(trainable, opt_state, frozen, batch) -> (trainable, opt_state, metrics)`.

    If the loss or the gradients are not finite, parameters and state come back as they were, and the
    metric `nonfinite` is 1.

    Args:
      graphdef: the model's structure; see `models.sharegpt4v.abstract_model`.
      optimizer: see `train.optimizer`.
      compute_dtype: dtype of activations and of the weights that meet them; masters stay as they are.
      remat: what the backward pass recomputes; see `models.layers.run_stack`.
      loss_chunk: pieces of the vocabulary whose scores exist at a time.
      accumulate: microbatches per step; rows must divide by it.
      reduction: see `normalize_weights`.
      kinds: how many of `Batch.kinds` the losses are told apart by.
    """
    loss = make_loss(graphdef, compute_dtype=compute_dtype, remat=remat, loss_chunk=loss_chunk, kinds=kinds)

    def train_step(
        trainable: Params, opt_state: Any, frozen: Params, batch: Batch
    ) -> tuple[Params, Any, Metrics]:
        rows = batch.tokens.shape[0]
        if rows % accumulate:
            raise ValueError(f"{rows} rows do not divide by config.train.accumulate={accumulate}")
        # Microbatch i takes every n-th row, so that each keeps its share of every device's rows.
        micro = jax.tree.map(
            lambda x: jnp.moveaxis(x.reshape(rows // accumulate, accumulate, *x.shape[1:]), 1, 0), batch
        )
        supervised = batch.loss_weights.sum()
        weights = normalize_weights(micro.loss_weights, reduction)

        def add(total: tuple[Any, Array, Metrics], inputs: tuple[Batch, Array]) -> tuple[Any, None]:
            part, weight = inputs
            part = Batch(**{**vars(part), "loss_weights": weight})
            (value, sums), grads = jax.value_and_grad(loss, has_aux=True)(trainable, frozen, part)
            return jax.tree.map(jnp.add, total, (grads, value, sums)), None

        zero = jnp.zeros((), jnp.float32)
        none = {
            "accuracy": zero,
            "kind_losses": jnp.zeros(kinds, jnp.float32),
            "kind_tokens": jnp.zeros(kinds, jnp.int32),
        }
        start = (jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), trainable), zero, none)
        if accumulate == 1:
            total, _ = add(start, jax.tree.map(lambda x: x[0], (micro, weights)))
        else:
            total, _ = jax.lax.scan(add, start, (micro, weights))
        grads, value, sums = total
        updates, new_opt_state = optimizer.update(grads, opt_state, trainable)
        grad_norm = optax.tree.norm(grads)
        # A step that is not finite changes nothing, whatever the optimizer made of it (train.nonfinite).
        finite = jnp.isfinite(value) & jnp.isfinite(grad_norm)
        new_trainable, new_opt_state = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old),
            (optax.apply_updates(trainable, updates), new_opt_state),
            (trainable, opt_state),
        )
        metrics = {
            "loss": value,
            **sums,
            "grad_norm": grad_norm,
            **{f"grad_norm/{tower}": optax.tree.norm(part) for tower, part in grads.items()},
            "nonfinite": 1 - finite.astype(jnp.int32),
            "supervised_tokens": supervised,
            **contents(batch),
        }
        return new_trainable, new_opt_state, metrics

    return train_step
