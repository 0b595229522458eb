"""Attention of new positions to a cache: of one per slot, generation; of several answers, scoring.

The cache of all layers is passed whole, with the number of the layer: cutting a layer out would copy it
for a kernel, and copying costs as much as reading. The new position is not in the cache yet; all layers'
new positions are written together, after the last layer (`models.cache`).
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType
from jaxtyping import Array, Float, Int

from sg4v_jax.kernels.attention import interpreter, wanted_implementation
from sg4v_jax.kernels.tpu import decode
from sg4v_jax.kernels.tpu.blocks import choice
from sg4v_jax.kernels.tpu.machine import current_machine
from sg4v_jax.parallel.rules import spec

# Of keys and values; without the last one, of their scales.
CACHE_AXES = ("layers", "batch", "kv_heads", "length", "head_dim")
# What the plain form reads at a time on a CPU: so many positions of as many slots as have so many bytes of
# keys, which a core's cache holds. It stops after the longest of these slots.
CPU_BLOCK, CPU_BYTES = 128, 1 << 18


def decode_attention(
    query: Float[Array, "batch heads head_dim"],
    key: Float[Array, "batch kv_heads head_dim"],
    value: Float[Array, "batch kv_heads head_dim"],
    cached_key: Float[Array, "layers batch parts rows head_dim"] | Int[Array, "..."],
    cached_value: Float[Array, "layers batch parts rows head_dim"] | Int[Array, "..."],
    layer: Int[Array, ""],
    lengths: Int[Array, " batch"],
    scales: tuple[Float[Array, "layers batch parts rows"], Float[Array, "layers batch parts rows"]]
    | None = None,
    *,
    implementation: str = "auto",
) -> Float[Array, "batch heads head_dim"]:
    """Attention of each slot's new position to its first `lengths` cached positions and to itself.

    Args:
      query, key, value: the new position.
      cached_key, cached_value: all layers' caches, floating or int8, as `models.cache.KVCache` keeps them.
      layer: which layer's to read.
      lengths: positions in use per slot.
      scales: what to multiply cached keys and values by, if they are int8.
      implementation: `auto`, `reference` (plain JAX), `tpu` or `interpret`; see `kernels.attention`.

    Returns:
      The attended values, in the dtype of `query`. A slot's are bitwise the same whatever the other
      slots hold.

    Raises:
      ValueError: if `implementation` can't run here or on these arguments.
    """
    operands = (query, key, value, cached_key, cached_value, layer, lengths, scales)
    wanted = wanted_implementation(implementation)
    if wanted in ("tpu", "interpret"):
        machine = current_machine() if wanted == "tpu" else interpreter()
        reason = _refusal(query, key, cached_key)
        if reason is None:
            table = choice(machine.name)
            rows = table.decode if scales is None else table.decode_int8

            def run(*local: Any) -> Array:
                *arrays, scales = local
                return decode.attention(*arrays, machine=machine, rows=rows, scales=scales)  # type: ignore[misc]

            return _on_mesh(run, *operands)
        if implementation != "auto":
            raise ValueError(f"decoding with {wanted!r} can't run this: {reason}")
    return blockwise(*operands, *_plain_blocks(key, cached_key))


def _capacity(key: Array, cached_key: Array) -> int:
    """Positions of a slot."""
    count, rows = cached_key.shape[2:4]
    return count * rows // key.shape[1]


def _plain_blocks(key: Array, cached_key: Array) -> tuple[int, int]:
    """How many slots, and positions of them, the plain form takes at a time."""
    batch, capacity, mesh = key.shape[0], _capacity(key, cached_key), jax.sharding.get_abstract_mesh()
    if jax.default_backend() != "cpu" or capacity % CPU_BLOCK:
        return batch, capacity
    # Slots that a mesh spreads are not cut apart.
    fit = batch if mesh.size > 1 else CPU_BYTES // (CPU_BLOCK * key[0].size * cached_key.dtype.itemsize)
    return math.gcd(batch, 1 << max(fit, 1).bit_length() - 1), CPU_BLOCK


def _refusal(query: Array, key: Array, cached_key: Array) -> str | None:
    """Why the kernel doesn't take this, or None if it does."""
    if query.dtype not in ("bfloat16", "float32"):
        return f"dtype {query.dtype} is neither bfloat16 nor float32"
    mesh = jax.sharding.get_abstract_mesh()
    capacity, kv_heads = _capacity(key, cached_key), key.shape[1]
    if not mesh.empty:
        heads = (("heads", query.shape[1]), ("kv_heads", kv_heads))
        split, kv_split = (spec((name,), (size,), mesh)[0] for name, size in heads)
        if split != kv_split:
            return f"{kv_heads} key heads can't be split as the {query.shape[1]} query heads are"
        kv_heads //= _ways(kv_heads, mesh)
    try:
        decode.block_positions(capacity, kv_heads, 1)
    except ValueError as error:
        return str(error)
    return None


def parts(kv_heads: int) -> int:
    """Into how many parts a cache has its key heads, each with its own rows: those that the mesh splits.

    Where no kernel reads the cache every head is one: a product takes a head's positions as they lie.
    """
    if wanted_implementation("auto") != "tpu":
        return kv_heads
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty or AxisType.Manual in mesh.axis_types else _ways(kv_heads, mesh)


def _ways(kv_heads: int, mesh: AbstractMesh) -> int:
    """Over how many devices the key heads are split."""
    axis = spec(("kv_heads",), (kv_heads,), mesh)[0]
    return 1 if axis is None else int(mesh.shape[axis])


def _on_mesh(run, query, key, value, cached_key, cached_value, layer, lengths, scales):  # type: ignore[no-untyped-def]
    """Runs a kernel on each device's slots and heads, by the table of sharding rules."""
    operands = (query, key, value, cached_key, cached_value, layer, lengths, scales)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or AxisType.Manual in mesh.axis_types:
        return run(*operands)
    new = [
        spec(("batch", name, "head_dim"), x.shape, mesh) for name, x in (("heads", query), ("kv_heads", key))
    ]
    cache = spec(CACHE_AXES, cached_key.shape, mesh)
    scale = None if scales is None else (spec(CACHE_AXES[:4], scales[0].shape, mesh),) * 2
    rows = spec(("batch",), lengths.shape, mesh)
    in_specs = (new[0], new[1], new[1], cache, cache, spec((), (), mesh), rows, scale)
    return jax.shard_map(run, in_specs=in_specs, out_specs=new[0], check_vma=False)(*operands)


def blockwise(query, key, value, cached_key, cached_value, layer, lengths, scales, slots, block):  # type: ignore[no-untyped-def]
    """The same in plain JAX: a running softmax over blocks of positions, for some slots after the others.

    It goes up to the last block of the longest of these `slots`. A block that a slot has nothing in changes
    nothing of the slot's sums, to the bit.
    """
    batch, heads, head_dim = query.shape
    capacity, kv_heads = _capacity(key, cached_key), key.shape[1]
    scale = head_dim**-0.5
    query = query.reshape(batch, kv_heads, heads // kv_heads, head_dim)

    def cut(x, first, j):  # type: ignore[no-untyped-def]
        """[slots, kv_heads, block, ...]; with a part for each head, as it lies in memory."""
        count, width, rest = x.shape[2], kv_heads // x.shape[2], x.shape[4:]
        start = (layer, first, 0, j * block * width, 0)[: x.ndim]
        part = jax.lax.dynamic_slice(x, start, (1, slots, count, block * width, *rest))
        part = part.reshape(slots, count, block, width, *rest).swapaxes(2, 3)
        return part.reshape(slots, kv_heads, block, *rest)

    def attend(first):  # type: ignore[no-untyped-def]
        own = (jax.lax.dynamic_slice_in_dim(x, first, slots) for x in (query, key, value, lengths))
        queries, new_key, new_value, used = own

        def visit(j, carry):  # type: ignore[no-untyped-def]
            maximum, total, acc = carry
            keys, values = (cut(x, first, j).astype(query.dtype) for x in (cached_key, cached_value))
            scores = jnp.einsum("bkgd,bktd->bkgt", queries, keys, preferred_element_type=jnp.float32) * scale
            if scales is not None:
                scores = scores * cut(scales[0], first, j)[:, :, None]
            seen = j * block + jnp.arange(block) < used[:, None, None, None]
            scores = jnp.where(seen, scores, -jnp.inf)
            top = jnp.maximum(maximum, scores.max(-1, keepdims=True))
            shrink, weights = jnp.exp(maximum - top), jnp.exp(scores - top)
            total = total * shrink + weights.sum(-1, keepdims=True)
            if scales is not None:
                weights = weights * cut(scales[1], first, j)[:, :, None]
            weights = weights.astype(query.dtype)
            found = jnp.einsum("bkgt,bktd->bkgd", weights, values, preferred_element_type=jnp.float32)
            return top, total, acc * shrink + found

        # The new position begins the sums.
        product = queries.astype(jnp.float32) * new_key[:, :, None].astype(jnp.float32)
        itself = product.sum(-1, keepdims=True) * scale
        value_first = jnp.broadcast_to(new_value[:, :, None].astype(jnp.float32), queries.shape)
        carry = (itself, jnp.ones_like(itself), value_first)
        if block == capacity:
            carry = visit(0, carry)
        else:
            carry = jax.lax.fori_loop(0, -(-used.max() // block), visit, carry)
        _, total, acc = carry
        return (acc / total).astype(query.dtype)

    if slots == batch:
        return attend(0).reshape(batch, heads, head_dim)
    return jax.lax.map(attend, jnp.arange(0, batch, slots)).reshape(batch, heads, head_dim)


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
