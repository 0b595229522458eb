"""Next-token loss without the full logits: [batch, length, vocab] never exists."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


def chunked_cross_entropy(
    hidden: Float[Array, "batch length d"],
    targets: Int[Array | np.ndarray, "batch length"],
    weights: Float[Array | np.ndarray, "batch length"],
    logits: Callable[[Float[Array, "batch chunk d"]], Float[Array, "batch chunk vocab"]],
    chunk: int,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Weighted sums of the loss and of correct predictions.

    The sequence is cut into chunks whose logits live one at a time, and are computed again in the
    backward pass.

    Args:
      hidden: final hidden states.
      targets: token to predict at each position.
      weights: weight of each position; 0 leaves it out.
      logits: the output head, giving float32 scores.
      chunk: positions at a time.

    Returns:
      (sum of weighted cross-entropy in nats, sum of weights where the argmax is right).
    """
    length = hidden.shape[1]
    chunk = min(chunk, length)
    padding = -length % chunk

    def split(x: Array | np.ndarray) -> Array:
        """[batch, length, ...] to [chunks, batch, chunk, ...]."""
        x = jnp.pad(x, ((0, 0), (0, padding)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(x.shape[0], -1, chunk, *x.shape[2:]), 1, 0)

    @jax.checkpoint
    def step(
        sums: tuple[Array, Array], inputs: tuple[Array, Array, Array]
    ) -> tuple[tuple[Array, Array], None]:
        hidden, targets, weights = inputs
        # A position that doesn't count may hold anything, infinities included: select, don't
        # multiply. Before the head, or its gradient would be 0 * inf.
        scores = logits(jnp.where(weights[..., None] > 0, hidden, 0))
        chosen = jnp.take_along_axis(scores, targets[..., None], axis=-1)[..., 0]
        losses = jax.nn.logsumexp(scores, axis=-1) - chosen
        losses = losses * weights
        correct = jnp.where(scores.argmax(-1) == targets, weights, 0)
        return (sums[0] + losses.sum(), sums[1] + correct.sum()), None

    zero = jnp.zeros((), jnp.float32)
    sums, _ = jax.lax.scan(step, (zero, zero), (split(hidden), split(targets), split(weights)))
    return sums
