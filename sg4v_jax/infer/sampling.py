"""From scores to the next token, each row by its own options."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt

from sg4v_jax.infer.options import SamplingOptions


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowOptions:
    """`SamplingOptions` of a batch, as arrays with a leading batch axis."""

    max_new_tokens: Int[Array, " batch"]
    temperature: Float[Array, " batch"]
    top_p: Float[Array, " batch"]
    top_k: Int[Array, " batch"]
    repetition_penalty: Float[Array, " batch"]
    seed: UInt[Array, " batch"]
    min_new_tokens: Int[Array, " batch"]
    no_repeat_ngram: Int[Array, " batch"]
    num_beams: Int[Array, " batch"]
    length_penalty: Float[Array, " batch"]

    @classmethod
    def of(cls, rows: Sequence[SamplingOptions]) -> "RowOptions":
        """Stacks the options of several rows."""
        dtypes = {int: np.int32, float: np.float32}
        names = [field.name for field in dataclasses.fields(cls)]
        types = {field.name: field.type for field in dataclasses.fields(SamplingOptions)}
        columns = {
            # Seeds are taken modulo 2**32.
            name: np.array([row.seed % 2**32 for row in rows], np.uint32)
            if name == "seed"
            else np.array([getattr(row, name) for row in rows], dtypes[types[name]])  # type: ignore[index]
            for name in names
        }
        return cls(**columns)  # type: ignore[arg-type]


def penalize(
    scores: Float[Array, "batch vocab"],
    seen: Bool[Array, "batch vocab"],
    history: Int[Array, "batch capacity"],
    lengths: Int[Array, " batch"],
    step: Int[Array, " batch"],
    options: RowOptions,
    stop_ids: tuple[int, ...],
) -> Float[Array, "batch vocab"]:
    """Scores after what depends on the tokens before, in the order of `transformers`.

    Args:
      scores: logits, or log-probabilities in a beam search.
      seen: tokens of the prompt or generated so far.
      history: these tokens in order; negative where an image feature is.
      lengths: how many there are.
      step: tokens generated so far.
      options: the rows' options.
      stop_ids: tokens that end an answer.
    """
    penalty = options.repetition_penalty[:, None]
    scores = jnp.where(seen, jnp.where(scores > 0, scores / penalty, scores * penalty), scores)
    size = options.no_repeat_ngram
    ban = lambda scores: jnp.where(_completes_ngram(scores, history, lengths, size), -jnp.inf, scores)  # noqa: E731
    scores = jax.lax.cond((size > 0).any(), ban, lambda scores: scores, scores)
    too_early = (step < options.min_new_tokens)[:, None]
    ends = jnp.isin(jnp.arange(scores.shape[1]), jnp.array(stop_ids))
    return jnp.where(too_early & ends, -jnp.inf, scores)


def sample(
    scores: Float[Array, "batch vocab"], step: Int[Array, " batch"], options: RowOptions
) -> Int[Array, " batch"]:
    """Chooses the next token of each row: temperature, top-k and top-p, in the order of `transformers`.

    Args:
      scores: what `penalize` returned.
      step: tokens generated so far; with the row's seed it determines the draw.
      options: the rows' options.
    """
    greedy = scores.argmax(-1).astype(jnp.int32)

    def draw() -> Array:
        drawn = jax.vmap(_draw)(scores, step, options).astype(jnp.int32)
        return jnp.where(options.temperature > 0, drawn, greedy)

    # Sorting the vocabulary takes longer than all the rest.
    return jax.lax.cond((options.temperature > 0).any(), draw, lambda: greedy)


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


def _completes_ngram(
    scores: Float[Array, "batch vocab"],
    history: Int[Array, "batch capacity"],
    lengths: Int[Array, " batch"],
    size: Int[Array, " batch"],
) -> Bool[Array, "batch vocab"]:
    """Tokens that would make the last `size` tokens of a row ones that it has already had."""
    place = jnp.arange(history.shape[1])

    def compare(j: Array, same: Array) -> Array:
        # Whether the j-th token from a place on is the j-th of the last size - 1.
        last = jnp.take_along_axis(history, (lengths - size + 1 + j)[:, None], axis=1)
        equal = jnp.roll(history, -j, axis=1) == last
        return same & (equal | (j >= size - 1)[:, None])

    same = jax.lax.fori_loop(0, size.max() - 1, compare, jnp.ones(history.shape, bool))
    # The token that came after such a place; it must lie within what there is.
    after = place + size[:, None] - 1
    follower = jnp.take_along_axis(history, jnp.minimum(after, history.shape[1] - 1), axis=1)
    found = same & (after < lengths[:, None]) & (size > 0)[:, None] & (follower >= 0)
    rows = jnp.arange(scores.shape[0])[:, None]
    vocab = scores.shape[1]
    return jnp.zeros(scores.shape, bool).at[rows, jnp.where(found, follower, vocab)].set(True, mode="drop")
