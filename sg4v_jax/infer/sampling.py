"""From scores to the next token, each row by its own options."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt

from sg4v_jax.infer.request import SamplingOptions


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowOptions:
    """`SamplingOptions` of a batch, as arrays with a leading batch axis."""

    temperature: Float[Array, " batch"]
    top_p: Float[Array, " batch"]
    top_k: Int[Array, " batch"]
    repetition_penalty: Float[Array, " batch"]
    seed: UInt[Array, " batch"]

    @classmethod
    def of(cls, rows: list[SamplingOptions]) -> "RowOptions":
        """Stacks the options of several rows."""
        column = lambda name, dtype: jnp.array([getattr(row, name) for row in rows], dtype)  # noqa: E731
        return cls(
            temperature=column("temperature", jnp.float32),
            top_p=column("top_p", jnp.float32),
            top_k=column("top_k", jnp.int32),
            repetition_penalty=column("repetition_penalty", jnp.float32),
            seed=column("seed", jnp.uint32),
        )


def sample(
    logits: Float[Array, "batch vocab"],
    seen: Bool[Array, "batch vocab"],
    step: Int[Array, " batch"],
    options: RowOptions,
) -> Int[Array, " batch"]:
    """Chooses the next token of each row.

    The order of the filters is that of `transformers`: repetition penalty, temperature, top-k, top-p.

    Args:
      logits: scores.
      seen: tokens of the prompt or generated so far.
      step: tokens generated so far; with the row's seed it determines the draw.
      options: the rows' options.
    """
    penalty = options.repetition_penalty[:, None]
    penalized = jnp.where(logits > 0, logits / penalty, logits * penalty)
    logits = jnp.where(seen, penalized, logits)
    greedy = logits.argmax(-1)
    draw = jax.vmap(_draw)(logits, step, options)
    return jnp.where(options.temperature > 0, draw, greedy).astype(jnp.int32)


def _draw(logits: Float[Array, " vocab"], step: Int[Array, ""], options: RowOptions) -> Int[Array, ""]:
    logits = logits / jnp.maximum(options.temperature, 1e-6)
    ranked = jnp.sort(logits, descending=True)
    kept = jnp.where(options.top_k > 0, options.top_k, logits.size)
    logits = jnp.where(logits < ranked[kept - 1], -jnp.inf, logits)
    # A token stays if the probability of the better ones has not reached top_p yet.
    ranked = jnp.where(jnp.arange(logits.size) < kept, ranked, -jnp.inf)
    probabilities = jax.nn.softmax(ranked)
    before = jnp.cumsum(probabilities) - probabilities
    threshold = jnp.where(before < options.top_p, ranked, jnp.inf).min()
    logits = jnp.where(logits < threshold, -jnp.inf, logits)
    key = jax.random.fold_in(jax.random.key(options.seed), step)
    return jax.random.categorical(key, logits)
