"""Attention in plain JAX: the definition that the kernels are tested against."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def attention(
    query: Float[Array, "batch q_length heads head_dim"],
    key: Float[Array, "batch kv_length kv_heads head_dim"],
    value: Float[Array, "batch kv_length kv_heads head_dim"],
    *,
    causal: bool,
    segment_ids: Int[Array, "batch q_length"] | None,
) -> Float[Array, "batch q_length heads head_dim"]:
    """See `kernels.attention.attention`. Materialises the scores."""
    batch, q_length, heads, head_dim = query.shape
    kv_heads = key.shape[2]
    query = query.reshape(batch, q_length, kv_heads, heads // kv_heads, head_dim)
    scores = jnp.einsum("bqkgd,btkd->bkgqt", query, key, preferred_element_type=jnp.float32)
    scores = scores * head_dim**-0.5
    mask = _mask(q_length, key.shape[1], causal, segment_ids)
    if mask is not None:
        scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1)
    weights = weights.astype(value.dtype)
    attended = jnp.einsum("bkgqt,btkd->bqkgd", weights, value)
    return attended.reshape(batch, q_length, heads, head_dim)


def _mask(
    q_length: int,
    kv_length: int,
    causal: bool,
    segment_ids: Int[Array, "batch q_length"] | None,
) -> Bool[Array, "#batch #q_length kv_length"] | None:
    mask = None
    if causal:
        mask = jnp.tril(jnp.ones((1, q_length, kv_length), bool))
    if segment_ids is not None:
        same = segment_ids[:, :, None] == segment_ids[:, None, :]
        mask = same if mask is None else mask & same
    return mask
