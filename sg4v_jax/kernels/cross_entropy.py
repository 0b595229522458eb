"""Next-token loss without the full logits: [batch, length, vocab] never exists."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int


def chunked_cross_entropy(
    hidden: Float[Array, "batch length d"],
    targets: Int[Array | np.ndarray, "batch length"],
    counts: Bool[Array | np.ndarray, "batch length"],
    logits: Callable[[Float[Array, "batch chunk d"]], Float[Array, "batch chunk vocab"]],
    chunk: int,
) -> tuple[Float[Array, "batch length"], Bool[Array, "batch length"]]:
    """The loss of each position, and whether its prediction is right.

    The sequence is cut into chunks whose logits live one at a time, and are computed again in the
    backward pass.

    Args:
      hidden: final hidden states.
      targets: token to predict at each position.
      counts: which positions count; the others' loss and gradient are 0, whatever they hold.
      logits: the output head, giving float32 scores.
      chunk: positions at a time.

    Returns:
      (cross-entropy in nats, whether the argmax is right).
    """
    length = hidden.shape[1]
    chunk = min(chunk, length)
    padding = -length % chunk

    def split(x: Array | np.ndarray) -> Array:
        """[batch, length, ...] to [chunks, batch, chunk, ...]."""
        x = jnp.pad(x, ((0, 0), (0, padding)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(x.shape[0], -1, chunk, *x.shape[2:]), 1, 0)

    @jax.checkpoint
    def step(_: None, inputs: tuple[Array, Array, Array]) -> tuple[None, tuple[Array, Array]]:
        hidden, targets, counts = inputs
        # A position that doesn't count may hold anything, infinities included: select, don't
        # multiply. Before the head, or its gradient would be 0 * inf.
        scores = logits(jnp.where(counts[..., None], hidden, 0))
        chosen = jnp.take_along_axis(scores, targets[..., None], axis=-1)[..., 0]
        losses = jnp.where(counts, jax.nn.logsumexp(scores, axis=-1) - chosen, 0)
        return None, (losses, counts & (scores.argmax(-1) == targets))

    _, found = jax.lax.scan(step, None, (split(hidden), split(targets), split(counts)))
    losses, correct = (jnp.moveaxis(x, 0, 1).reshape(len(targets), -1)[:, :length] for x in found)
    return losses, correct
