"""Attention of new positions to a cache: of one per slot, generation; of several answers, scoring.

The cache of all layers is passed whole, with the number of the layer: cutting a layer out would copy it
for a kernel, and copying costs as much as reading. The new position is not in the cache yet; all layers'
new positions are written together, after the last layer (`models.cache`).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

# Positions that the plain form reads at a time on a CPU: it stops after the longest slot.
CPU_BLOCK = 128


def decode_attention(
    query: Float[Array, "batch heads head_dim"],
    key: Float[Array, "batch kv_heads head_dim"],
    value: Float[Array, "batch kv_heads head_dim"],
    cached_key: Float[Array, "layers batch capacity kv_heads head_dim"] | Int[Array, "..."],
    cached_value: Float[Array, "layers batch capacity kv_heads head_dim"] | Int[Array, "..."],
    layer: Int[Array, ""],
    lengths: Int[Array, " batch"],
    scales: tuple[
        Float[Array, "layers batch capacity kv_heads"], Float[Array, "layers batch capacity kv_heads"]
    ]
    | None = None,
) -> Float[Array, "batch heads head_dim"]:
    """Attention of each slot's new position to its first `lengths` cached positions and to itself.

    Args:
      query, key, value: the new position.
      cached_key, cached_value: all layers' caches, floating or int8.
      layer: which layer's to read.
      lengths: positions in use per slot.
      scales: what to multiply cached keys and values by, if they are int8.

    Returns:
      The attended values, in the dtype of `query`. A slot's are bitwise the same whatever the other
      slots hold.
    """
    capacity = cached_key.shape[2]
    block = CPU_BLOCK if jax.default_backend() == "cpu" and capacity % CPU_BLOCK == 0 else capacity
    return blockwise(query, key, value, cached_key, cached_value, layer, lengths, scales, block)


def blockwise(query, key, value, cached_key, cached_value, layer, lengths, scales, block):  # type: ignore[no-untyped-def]
    """The same in plain JAX: a running softmax over blocks of positions, up to the longest slot's last.

    A block that a slot has nothing in changes nothing of the slot's sums, to the bit.
    """
    batch, heads, head_dim = query.shape
    capacity, kv_heads = cached_key.shape[2:4]
    groups = heads // kv_heads
    scale = head_dim**-0.5
    own = jnp.eye(kv_heads, dtype=query.dtype)

    def cut(x, j):  # type: ignore[no-untyped-def]
        sizes = (1, batch, block, *x.shape[3:])
        return jax.lax.dynamic_slice(x, (layer, 0, j * block) + (0,) * (x.ndim - 3), sizes)[0]

    def visit(j, carry):  # type: ignore[no-untyped-def]
        maximum, total, acc = carry
        # As a matrix of positions * heads rows, the way it lies in memory: XLA would copy the block to
        # bring a head's rows together. All heads meet all rows, and only the own ones are kept.
        rows = (batch, block * kv_heads, head_dim)
        keys, values = (cut(x, j).reshape(rows).astype(query.dtype) for x in (cached_key, cached_value))
        scores = jnp.einsum("bhd,brd->bhr", query, keys, preferred_element_type=jnp.float32) * scale
        scores = scores.reshape(batch, kv_heads, groups, block, kv_heads)
        scores = jnp.einsum("bkgtk->bkgt", scores)
        if scales is not None:
            scores = scores * cut(scales[0], j).transpose(0, 2, 1)[:, :, None]
        seen = j * block + jnp.arange(block) < lengths[:, None, None, None]
        scores = jnp.where(seen, scores, -jnp.inf)
        top = jnp.maximum(maximum, scores.max(-1, keepdims=True))
        shrink, weights = jnp.exp(maximum - top), jnp.exp(scores - top)
        total = total * shrink + weights.sum(-1, keepdims=True)
        if scales is not None:
            weights = weights * cut(scales[1], j).transpose(0, 2, 1)[:, :, None]
        weights = weights.astype(query.dtype)[..., None] * own[:, None, None, :]
        weights = weights.reshape(batch, heads, block * kv_heads)
        found = jnp.einsum("bhr,brd->bhd", weights, values, preferred_element_type=jnp.float32)
        return top, total, acc * shrink + found.reshape(acc.shape)

    query_groups = query.reshape(batch, kv_heads, groups, head_dim).astype(jnp.float32)
    itself = (query_groups * key[:, :, None].astype(jnp.float32)).sum(-1, keepdims=True) * scale
    first = jnp.broadcast_to(value[:, :, None].astype(jnp.float32), query_groups.shape)
    carry = (itself, jnp.ones_like(itself), first)
    if block == capacity:
        carry = visit(0, carry)
    else:
        carry = jax.lax.fori_loop(0, -(-lengths.max() // block), visit, carry)
    _, total, acc = carry
    return (acc / total).reshape(query.shape).astype(query.dtype)


def branch_attention(
    query: Float[Array, "batch branches length heads head_dim"],
    key: Float[Array, "batch branches length kv_heads head_dim"],
    value: Float[Array, "batch branches length kv_heads head_dim"],
    prefix_key: Float[Array, "batch prefix kv_heads head_dim"],
    prefix_value: Float[Array, "batch prefix kv_heads head_dim"],
    lengths: Int[Array, " batch"],
) -> Float[Array, "batch branches length heads head_dim"]:
    """Causal attention of several continuations of each row's prefix, which don't see each other.

    Args:
      query, key, value: the continuations.
      prefix_key, prefix_value: what comes before all of a row's continuations.
      lengths: how many leading positions of a prefix are valid.
    """
    length, heads, head_dim = query.shape[2:]
    kv_heads = key.shape[3]
    query = query.reshape(*query.shape[:3], kv_heads, heads // kv_heads, head_dim)
    scores = [
        jnp.einsum("bcqkgd,btkd->bckgqt", query, prefix_key, preferred_element_type=jnp.float32),
        jnp.einsum("bcqkgd,bcskd->bckgqs", query, key, preferred_element_type=jnp.float32),
    ]
    in_prefix = jnp.arange(prefix_key.shape[1]) < lengths[:, None]
    seen = [in_prefix[:, None, None, None, None], jnp.tril(jnp.ones((length, length), bool))]
    joined = jnp.concatenate([jnp.where(m, s, -jnp.inf) for m, s in zip(seen, scores, strict=True)], axis=-1)
    weights = jax.nn.softmax(joined * head_dim**-0.5, axis=-1).astype(value.dtype)
    before, own = weights[..., :-length], weights[..., -length:]
    attended = jnp.einsum("bckgqt,btkd->bcqkgd", before, prefix_value)
    attended += jnp.einsum("bckgqs,bcskd->bcqkgd", own, value)
    return attended.reshape(*attended.shape[:3], heads, head_dim)
