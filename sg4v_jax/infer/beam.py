"""Beam search, as `transformers` does it (its `early_stopping=False`).

With beams, the slots come in groups of a fixed size; a request takes a group, and with it up to that many
beams. Running beams are the group's slots; what has ended is kept here, best first.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sg4v_jax.infer.sampling import RowOptions

# Stands for "no such beam" in scores; finite, so that sums with it stay in order.
NONE = -1.0e9


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Beams:
    """The beams of all groups.

    Attributes:
      score: float32[groups, beams], log-probabilities of the running beams.
      tokens: int32[groups, beams, capacity], what the running beams have generated.
      ended_score: float32[groups, beams], of beams that ended: divided by length ** length_penalty.
      ended_tokens: int32[groups, beams, capacity].
      ended_length: int32[groups, beams]; 0 where nothing has ended yet.
      open: bool[groups], whether a running beam may still become better than those that ended.
    """

    score: Float[Array, "groups beams"]
    tokens: Int[Array, "groups beams capacity"]
    ended_score: Float[Array, "groups beams"]
    ended_tokens: Int[Array, "groups beams capacity"]
    ended_length: Int[Array, "groups beams"]
    open: Bool[Array, " groups"]

    @classmethod
    def empty(cls, groups: int, beams: int, capacity: int) -> "Beams":
        """Groups at the start of a search: all beams are equal, so all but one are out."""
        score = jnp.full((groups, beams), NONE).at[:, 0].set(0.0)
        tokens = jnp.zeros((groups, beams, capacity), jnp.int32)
        ended = jnp.full((groups, beams), NONE)
        return cls(score, tokens, ended, tokens, jnp.zeros((groups, beams), jnp.int32), score[:, 0] == 0)

    def restart(self, groups: Int[Array, " rows"]) -> "Beams":
        """Groups that begin a new search. Numbers that don't exist are ignored."""
        fresh = Beams.empty(groups.size, *self.tokens.shape[1:])
        return jax.tree.map(lambda old, new: old.at[groups].set(new, mode="drop"), self, fresh)


def choose(
    beams: Beams,
    log_probabilities: Float[Array, "slots vocab"],
    step: Int[Array, " slots"],
    options: RowOptions,
    stop_ids: tuple[int, ...],
) -> tuple[Beams, Int[Array, " slots"], Int[Array, " slots"], Bool[Array, " slots"]]:
    """Takes every group's search a token further.

    Args:
      beams: where the searches are.
      log_probabilities: of the next token, penalties applied.
      step: tokens generated so far.
      options: of the slots; a group goes by its first one's.
      stop_ids: tokens that end an answer.

    Returns:
      (beams, the token of each slot, the slot whose past it continues, whether its search is over).
    """
    groups, width = beams.score.shape
    vocab = log_probabilities.shape[1]
    first = lambda column: column.reshape(groups, width)[:, :1]  # noqa: E731
    count, limit, penalty = map(first, (options.num_beams, options.max_new_tokens, options.length_penalty))
    wanted = jnp.arange(width) < count
    length = first(step) + 1

    # Enough candidates for all beams to go on, even if every beam could end in every way.
    joint = (log_probabilities.reshape(groups, width, vocab) + beams.score[..., None]).reshape(groups, -1)
    score, index = jax.lax.top_k(joint, (1 + len(stop_ids)) * width)
    parent, token = index // vocab, index % vocab
    rows = jnp.arange(groups)[:, None]
    history = beams.tokens[rows, parent]
    at = jnp.minimum(length, beams.tokens.shape[2]) - 1
    history = jnp.where(jnp.arange(history.shape[2]) == at[..., None], token[..., None], history)
    ends = jnp.isin(token, jnp.array(stop_ids)) | (length >= limit)

    # Of the ended, only those count that are among the best beams.
    may_end = ends & (jnp.arange(score.shape[1]) < count) & beams.open[:, None]
    ended = jnp.where(may_end, score / length.astype(jnp.float32) ** penalty, NONE)
    joined = jnp.concatenate([beams.ended_score, ended], axis=1)
    ended_score, chosen = jax.lax.top_k(joined, width)
    pick = lambda old, new: jnp.concatenate([old, new], axis=1)[rows, chosen]  # noqa: E731
    ended_length = pick(beams.ended_length, jnp.where(may_end, length, 0)) * wanted
    ended_tokens = pick(beams.ended_tokens, history)
    ended_score = jnp.where(wanted, ended_score, NONE)

    running, chosen = jax.lax.top_k(jnp.where(ends, score + NONE, score), width)
    running = jnp.where(wanted, running, NONE)
    worst = jnp.where(wanted, ended_score, jnp.inf).min(1, keepdims=True)
    worst = jnp.where(ended_length > 0, worst, NONE)
    best = running[:, :1] / length.astype(jnp.float32) ** penalty
    still_open = beams.open & (wanted & (best > worst)).any(1)
    source = rows * width + parent[rows, chosen]
    over = ~(still_open[:, None] & (length < limit)) | ~wanted
    new = Beams(running, history[rows, chosen], ended_score, ended_tokens, ended_length, still_open)
    return new, token[rows, chosen].reshape(-1), source.reshape(-1), over.reshape(-1)
