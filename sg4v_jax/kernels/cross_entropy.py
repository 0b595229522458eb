"""Next-token loss without the full logits: [batch, length, vocab] never exists."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

from sg4v_jax.parallel.rules import constrain, parts

# The score of a piece that only fills up the last chunk. Finite: a chunk of nothing else has a gradient, too.
_NEVER = -1e30


def chunked_cross_entropy(
    hidden: Float[Array, "batch length d"],
    targets: Int[Array | np.ndarray, "batch length"],
    counts: Bool[Array | np.ndarray, "batch length"],
    head: Float[Array, "d vocab"],
    chunk: int,
) -> tuple[Float[Array, "batch length"], Bool[Array, "batch length"]]:
    """The loss of each position, and whether its prediction is right.

    The vocabulary is cut into chunks, and the scores of one live at a time; they are computed again in
    the backward pass. So does the chunk's part of the head, which is gathered for it, and its gradient.

    Args:
      hidden: final hidden states.
      targets: token to predict at each position.
      counts: which positions count; the others' loss and gradient are 0, whatever they hold.
      head: the output head's kernel.
      chunk: pieces of the vocabulary at a time.

    Returns:
      (cross-entropy in nats, whether the argmax is right).
    """
    # A position that doesn't count may hold anything, infinities included: select, don't multiply.
    # Before the head, or its gradient would be 0 * inf.
    hidden = jnp.where(counts[..., None], hidden, 0)
    targets = jnp.asarray(targets)[..., None, None]

    @jax.checkpoint
    def step(_: None, inputs: tuple[Array, Array]) -> tuple[None, tuple[Array, ...]]:
        head, pieces = inputs
        head = constrain(head, (None, "vocab", None))
        scores = jnp.tensordot(hidden, head, axes=1).astype(jnp.float32)
        scores = jnp.where(pieces < vocab, scores, _NEVER)
        chosen = jnp.where(pieces == targets, scores, 0).sum((-2, -1))
        best = scores.max((-2, -1), keepdims=True)
        first = jnp.where(scores == best, pieces, vocab).min((-2, -1))
        return None, (jax.nn.logsumexp(scores, axis=(-2, -1)), chosen, best[..., 0, 0], first)

    vocab = head.shape[1]
    cut = _cut(head, chunk, 0), _cut(jnp.arange(vocab)[None], chunk, vocab)[:, 0]
    _, (totals, chosen, best, first) = jax.lax.scan(step, None, cut)
    losses = jnp.where(counts, jax.nn.logsumexp(totals, axis=0) - chosen.sum(0), 0)
    # Of equal scores the first piece's counts, as for an argmax.
    found = jnp.where(best == best.max(0), first, vocab).min(0)
    return losses, jnp.asarray(counts) & (found == targets[..., 0, 0])


def _cut(
    x: Shaped[Array, "rows columns"], chunk: int, filling: int
) -> Shaped[Array, "chunks rows ways inner"]:
    """Columns in chunks, each with as many of every device's columns as of any other's."""
    rows, columns = x.shape
    ways = parts("vocab", columns)
    chunks = -(-columns // chunk)
    inner = -(-columns // (ways * chunks))
    x = x.reshape(rows, ways, -1)
    x = jnp.pad(x, ((0, 0), (0, 0), (0, chunks * inner - x.shape[2])), constant_values=filling)
    x = jnp.moveaxis(x.reshape(rows, ways, chunks, inner), 2, 0)
    return constrain(x, (None, "embed", "vocab", None))
