"""The one entry to attention, whatever the hardware.

Layouts are those of `jax.nn.dot_product_attention`: `[batch, length, heads, head_dim]`.
"""

import jax
from jaxtyping import Array, Float, Int

from sg4v_jax.kernels import reference

IMPLEMENTATIONS = {"reference": reference.attention}


def attention(
    query: Float[Array, "batch q_length heads head_dim"],
    key: Float[Array, "batch kv_length kv_heads head_dim"],
    value: Float[Array, "batch kv_length kv_heads head_dim"],
    *,
    causal: bool,
    segment_ids: Int[Array, "batch q_length"] | None = None,
    kv_lengths: Int[Array, " batch"] | None = None,
    implementation: str = "auto",
) -> Float[Array, "batch q_length heads head_dim"]:
    """Softmax attention with scale 1/sqrt(head_dim) and float32 softmax.

    Args:
      query: queries; `heads` must be a multiple of `kv_heads` (grouped-query attention).
      key: keys.
      value: values.
      causal: position i sees keys 0..i. Needs `q_length == kv_length`.
      segment_ids: positions see only their own segment. Needs `q_length == kv_length`. Padding is
        a segment of its own (0), so no row is ever fully masked.
      kv_lengths: how many leading keys of each row are valid; for decoding from a cache.
      implementation: `auto`, or the name of one that must run (an error if it can't).

    Returns:
      The attended values, in the dtype of `query`.

    Raises:
      ValueError: on an unknown implementation or shapes that don't fit together.
    """
    if query.shape[2] % key.shape[2]:
        raise ValueError(f"{query.shape[2]} query heads do not divide by {key.shape[2]} key/value heads")
    if (causal or segment_ids is not None) and query.shape[1] != key.shape[1]:
        raise ValueError(
            f"causal and segmented attention need equal lengths, got {query.shape[1]} queries "
            f"and {key.shape[1]} keys"
        )
    if implementation == "auto":
        implementation = "reference"
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"attention implementation {implementation!r} is not one of "
            f"{sorted(IMPLEMENTATIONS)} on {jax.default_backend()}"
        )
    return IMPLEMENTATIONS[implementation](
        query, key, value, causal=causal, segment_ids=segment_ids, kv_lengths=kv_lengths
    )
