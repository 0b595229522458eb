"""Causal attention over packed segments on a TPU: the decoder's training and prefill.

Derivation of the blocking
--------------------------
One program owns `queries` rows of `heads` heads; the keys and values of those heads lie in VMEM whole (or
a chunk of them, where rows are too long), and a loop *inside* the program walks over blocks of `keys`.
So the bounds of the loop can come from the data: `schedule` finds, for each block of queries, the first
block of keys that shares a segment with it and the first from which on no mask is needed. What lies
before costs nothing; what lies after skips the mask.

The matrix unit is the limit (64 cycles per 128 x 128 tile for the two products of the forward pass on
v5e, 160 for the five of the backward pass), so everything else has to hide behind it:

* The compiler overlaps within straight-line code only, and a tile's chain (product, maximum, exponential,
  product) is hundreds of cycles long. `tiles.in_pipeline` emits the scores of the *next* tile before the
  softmax of this one, across heads and rows.
* The diagonal block comes first. It is static, so it is cut into strips of `diagonal` rows that end at
  the diagonal; and each row has a key there (itself), so it sets the running maximum, sum and
  accumulator: nothing has to be cleared, and no row is ever without a finite maximum.
* Where the product with the values leaves lanes of the matrix unit idle (head_dim 64, or 128 on v6e's
  256 lanes), the values get columns of ones: the sums of the softmax then cost nothing.
* v6e has a bfloat16 exponential. Its argument is subtracted in float32 and rounded after: the error,
  p |x| 2^-9 with p = 2^x, never exceeds what rounding p for the matrix unit costs anyway.
* The backward pass keeps scores transposed, [keys, queries]: then dv and dk need no transposition, and
  the log-sum-exp and delta are rows. dk and dv of all keys stay in VMEM in float32 while the queries walk
  by, so that dq, dk and dv come out of one pass over the scores. Where they don't fit, the keys
  come in chunks, one after the other on each core, and each chunk has a float32 part of dq of its own.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from sg4v_jax.kernels.tpu.flash_backward import backward
from sg4v_jax.kernels.tpu.flash_forward import forward
from sg4v_jax.kernels.tpu.flash_plan import Problem, Settings, padded_length


def attention(
    query: Float[Array, "batch length heads head_dim"],
    key: Float[Array, "batch length kv_heads head_dim"],
    value: Float[Array, "batch length kv_heads head_dim"],
    segment_ids: Int[Array, "batch length"] | None,
    settings: Settings,
) -> Float[Array, "batch length heads head_dim"]:
    """Causal attention with scale 1/sqrt(head_dim) and float32 softmax, differentiable.

    Args:
      query: bfloat16 or float32; `heads` is a multiple of `kv_heads`.
      key, value: the same dtype.
      segment_ids: positions see only their own segment; None if there is one.
      settings: blocks and what the hardware can do.

    Returns:
      The attended values, in the dtype of `query`.
    """
    length = query.shape[1]
    # Padding comes after every real position, where the causal mask hides it.
    padding = padded_length(length, settings.forward.queries) - length
    if padding:
        query, key, value = (jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0))) for x in (query, key, value))
    segments = None
    if segment_ids is not None:
        segments = jnp.pad(segment_ids.astype(jnp.int32), ((0, 0), (0, padding)))[:, None]
    # XLA gives the projections' outputs this layout; no copy is made.
    out = _attention(settings, *(x.swapaxes(1, 2) for x in (query, key, value)), segments)
    return out.swapaxes(1, 2)[:, :length]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(settings: Settings, query: Array, key: Array, value: Array, segments: Array | None) -> Array:
    return _attention_fwd(settings, query, key, value, segments)[0]


def _attention_fwd(
    settings: Settings, query: Array, key: Array, value: Array, segments: Array | None
) -> tuple[Array, Any]:
    segmented = segments is not None
    problem = Problem.of(settings.machine, settings.forward, query, key, segmented=segmented, backward=False)
    # A remat policy that keeps both keeps the backward pass from running this kernel again.
    out, lse = (checkpoint_name(x, "attended") for x in forward(problem, query, key, value, segments))
    return out, (query, key, value, segments, out, lse)


def _attention_bwd(settings: Settings, residuals: Any, d_out: Array) -> tuple[Array, Array, Array, None]:
    query, key, value, segments, out, lse = residuals
    segmented = segments is not None
    problem = Problem.of(settings.machine, settings.backward, query, key, segmented=segmented, backward=True)
    return *backward(problem, query, key, value, segments, out, lse, d_out), None


_attention.defvjp(_attention_fwd, _attention_bwd)
