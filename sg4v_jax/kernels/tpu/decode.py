"""Attention of one new position per slot to its cache, on a TPU: generation.

Derivation of the blocking
--------------------------
Decoding reads the cache once and computes next to nothing with it, so the memory is the limit: 1311 us
for 32 slots of 2048 positions and 32 heads on v5e. What the kernel has to do is never to stop reading,
and to read only what a slot has.

* A slot's keys lie in memory as `[positions, kv_heads, head_dim]`; cutting heads out would shuffle
  sublanes all day. Instead the block is taken as a matrix of `positions * kv_heads` rows as it lies, and
  *all* query heads are multiplied with all of it. Pairs of a query head and a foreign key head are masked
  together with the positions beyond the slot's length. That wastes kv_heads - 1 of kv_heads of the matrix
  unit's work, which it has time for: keys and values are its stationary operand, so the cost is that of
  loading them, 0.8 of the time that the memory takes on v5e.
* The grid's steps beyond a slot's length name the block that is there already: they fetch nothing. They
  come before the others, so that the first block's transfer runs meanwhile.
* A block is large, since every step costs about 1000 cycles of one chain (product, maximum, exponential,
  product) that nothing overlaps; and within it the scores of the next tile come before the softmax of
  this one, as in the other kernels.
* Keys and values may be int8 with a scale per position and head, which halves the traffic; scores and
  weights are scaled instead of keys and values. Blocks have twice the rows then: the same bytes.
* The cache of all layers is one operand, and the layer a number that the blocks' places are computed from:
  a layer cut out of it would be copied for the kernel, read and written once more.
* The slot's new position is where the running softmax starts. It is not in the cache yet: writing 32 slots
  takes longer than all the rest if every layer does it, so it is done once, for all layers.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from sg4v_jax.kernels.tpu.machine import Machine
from sg4v_jax.kernels.tpu.tiles import LANES, LOG2_E, MASKED, dot, in_pipeline, lanes

# Rows of a block whose scores are taken together.
TILE = 4096


def attention(
    query: Float[Array, "batch heads head_dim"],
    key: Float[Array, "batch kv_heads head_dim"],
    value: Float[Array, "batch kv_heads head_dim"],
    cached_key: Float[Array, "layers batch 1 rows head_dim"] | Int[Array, "..."],
    cached_value: Float[Array, "layers batch 1 rows head_dim"] | Int[Array, "..."],
    layer: Int[Array, ""],
    lengths: Int[Array, " batch"],
    machine: Machine,
    *,
    rows: int,
    scales: tuple[Float[Array, "layers batch 1 rows"], Float[Array, "layers batch 1 rows"]] | None = None,
) -> Float[Array, "batch heads head_dim"]:
    """Attention of one query per slot to the first `lengths` positions of its cache, and to itself.

    Args:
      query, key, value: the new position, bfloat16 or float32.
      cached_key, cached_value: the cache, in the dtype of `query` or int8: rows of positions times heads.
      layer: which layer of it.
      lengths: positions in use per slot.
      machine: what the hardware can do.
      rows: rows of the cache (positions times key heads) per block, about.
      scales: what to multiply keys and values by, if they are int8.

    Returns:
      The attended values, in the dtype of `query`.
    """
    batch, heads, head_dim = query.shape
    kv_heads = key.shape[1]
    capacity = cached_key.shape[3] // kv_heads
    positions = block_positions(capacity, kv_heads, rows)
    size = positions * kv_heads

    def block_of(b: Any, j: Any, lengths: Any) -> Any:
        used = jnp.maximum(pl.cdiv(lengths[b], positions), 1)
        return jnp.maximum(j - (capacity // positions - used), 0)

    slot = pl.BlockSpec((None, heads, head_dim), lambda b, j, lengths, layer: (b, 0, 0))
    block = pl.BlockSpec(
        (None, None, None, size, head_dim),
        lambda b, j, lengths, layer: (layer[0], b, 0, block_of(b, j, lengths), 0),
    )
    new = [jnp.repeat(x, heads // kv_heads, axis=1) for x in (key, value)]
    in_specs = [slot, slot, slot, block, block]
    operands = [query, *new, cached_key, cached_value]
    if scales is not None:
        scale_block = pl.BlockSpec(
            (None, None, 1, size), lambda b, j, lengths, layer: (layer[0], b, 0, block_of(b, j, lengths))
        )
        in_specs += [scale_block, scale_block]
        operands += scales
    out: Array = pl.pallas_call(
        functools.partial(_kernel, kv_heads, positions),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch, capacity // positions),
            in_specs=in_specs,
            out_specs=slot,
            scratch_shapes=[
                pltpu.VMEM((heads, head_dim), jnp.float32),
                pltpu.VMEM((heads, LANES), jnp.float32),
                pltpu.VMEM((heads, LANES), jnp.float32),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct((batch, heads, head_dim), query.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=machine.vmem
        ),
        interpret=machine.interpret,
        name="decode",
    )(lengths.astype(jnp.int32), layer.astype(jnp.int32).reshape(1), *operands)
    return out


def block_positions(capacity: int, kv_heads: int, rows: int) -> int:
    """Positions per block: the most that divide the capacity, fill whole lanes and have about `rows` rows.

    Raises:
      ValueError: if there are none; the capacity should be a multiple of 128.
    """
    fits = [n for n in range(1, capacity + 1) if capacity % n == 0 and n * kv_heads % LANES == 0]
    if not fits:
        raise ValueError(f"no block of a cache of {capacity} positions and {kv_heads} heads fills 128 lanes")
    return max((n for n in fits if n * kv_heads <= rows), default=fits[0])


def _tiles(size: int, kv_heads: int) -> list[slice]:
    """Cuts a block's rows into equal tiles of at most `TILE`, of whole positions and whole lanes."""
    unit = math.lcm(LANES, kv_heads)
    fits = [n for n in range(unit, min(TILE, size) + 1, unit) if size % n == 0]
    n = max(fits, default=size)
    return [slice(start, start + n) for start in range(0, size, n)]


def _kernel(
    kv_heads: int,
    positions: int,
    lengths: Any,
    layer: Any,
    query: Any,
    new_key: Any,
    new_value: Any,
    key: Any,
    value: Any,
    *refs: Any,
) -> None:
    *scales, out, acc, maximum, total = refs
    b, j = pl.program_id(0), pl.program_id(1)
    heads, head_dim = query.shape
    length = lengths[b]
    skipped = pl.num_programs(1) - pl.cdiv(length, positions)

    @pl.when(j == 0)
    def start() -> None:
        itself = query[...].astype(jnp.float32) * new_key[...].astype(jnp.float32)
        itself = itself.sum(1, keepdims=True) * (head_dim**-0.5 * LOG2_E)
        maximum[...] = jnp.broadcast_to(itself, maximum.shape)
        total[...] = jnp.ones_like(total)
        acc[...] = new_value[...].astype(jnp.float32)

    @pl.when(j >= skipped)
    def visit() -> None:
        left = length - (j - skipped) * positions
        scale = head_dim**-0.5 * LOG2_E
        state = [maximum[...], total[...], acc[...]]

        def begin(tile: slice) -> Array:
            return dot(query[...], key[tile].astype(query.dtype), (1, 1))

        def finish(tile: slice, scores: Array) -> None:
            scores = scores * (scales[0][:, tile] * scale if scales else scale)
            column = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1)
            head = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 0)
            own = column % kv_heads == head // (heads // kv_heads)
            scores = jnp.where(own & (column < left * kv_heads - tile.start), scores, MASKED)
            before, total_before, acc_before = state
            top = jnp.maximum(before, scores.max(1, keepdims=True))
            shrink = jnp.exp2(before - top)
            weights = jnp.exp2(scores - lanes(top, scores.shape[1]))
            sums = total_before * shrink + weights.sum(1, keepdims=True)
            if scales:
                weights = weights * scales[1][:, tile]
            values = dot(weights.astype(query.dtype), value[tile].astype(query.dtype), (1, 0))
            state[:] = top, sums, acc_before * lanes(shrink, head_dim) + values

        in_pipeline(_tiles(key.shape[0], kv_heads), begin, finish)
        maximum[...], total[...], acc[...] = state

    @pl.when(j == pl.num_programs(1) - 1)
    def finish() -> None:
        out[...] = (acc[...] / lanes(total[...], head_dim)).astype(out.dtype)
