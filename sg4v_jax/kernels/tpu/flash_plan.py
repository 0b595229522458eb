"""How one direction of the decoder's attention is cut; `flash.py` derives it."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Int

from sg4v_jax.kernels.tpu.machine import Machine
from sg4v_jax.kernels.tpu.tiles import LANES, Heads, deal_heads

Shaped = Array | jax.ShapeDtypeStruct


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How the work of one direction is cut.

    Attributes:
      queries: rows of queries per program; a multiple of `keys` and of `diagonal`.
      keys: rows of keys per step of the inner loop.
      diagonal: rows per strip of the diagonal block.
      heads: query heads per program, at most, of 128 lanes in bfloat16. Of wider ones as many fewer, and
        where that is none, fewer queries.
    """

    queries: int
    keys: int
    diagonal: int
    heads: int

    def within(self, length: int) -> "Blocks":
        """The same for rows of `length` (a multiple of 128): no block is longer than that."""
        queries = _largest_part(self.queries, length)
        return dataclasses.replace(
            self,
            queries=queries,
            keys=_largest_part(self.keys, queries),
            diagonal=_largest_part(self.diagonal, queries),
        )


def _largest_part(limit: int, whole: int, unit: int = LANES) -> int:
    """The largest divisor of `whole` that is a multiple of `unit` and at most `limit`."""
    return max(n for n in range(unit, max(limit, unit) + 1, unit) if whole % n == 0)


def padded_length(length: int, queries: int) -> int:
    """The next length that cuts into blocks of a good size: one, or more of at least half of `queries`."""
    padded = -(-length // LANES) * LANES
    while padded > queries and 2 * _largest_part(queries, padded) < queries:
        padded += LANES
    return padded


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the kernels need to know besides their operands.

    Attributes:
      forward, backward: the blocks of each direction.
      machine: what the hardware can do.
    """

    forward: Blocks
    backward: Blocks
    machine: Machine


@dataclasses.dataclass(frozen=True)
class Problem:
    """One direction of attention at one shape.

    Attributes:
      blocks: how it is cut.
      heads: how heads are dealt to programs.
      head_dim: width of a head.
      chunk: keys that lie in VMEM at once.
      value_width: width of a head's values with their columns of ones; head_dim if there are none.
      exp_dtype: dtype of the exponential.
      machine: what the hardware can do.
    """

    blocks: Blocks
    heads: Heads
    head_dim: int
    chunk: int
    value_width: int
    exp_dtype: Any
    machine: Machine

    @classmethod
    def of(
        cls, machine: Machine, blocks: Blocks, query: Shaped, key: Shaped, *, segmented: bool, backward: bool
    ) -> "Problem":
        """The problem of arrays [batch, heads, length, head_dim]."""
        _, heads, length, head_dim = query.shape
        item, width = key.dtype.itemsize, pl.cdiv(head_dim, LANES) * LANES
        # How much wider a head is than those that the blocks were chosen for.
        times = pl.cdiv(item * width, 2 * LANES)
        if times > blocks.heads:
            blocks = dataclasses.replace(blocks, queries=blocks.queries * blocks.heads // times)
        blocks = blocks.within(length)
        # Two arrays in and, backward, two out, each twice as the next block is fetched or written
        # meanwhile; backward also two float32 sums. And the segments, a column of 128 lanes.
        per_key = width * ((8 * item + 2 * 4) if backward else 4 * item)
        column = 2 * 4 * LANES if segmented else 0

        def chunk_of(dealt: Heads) -> int:
            limit = machine.vmem // 2 // (per_key * dealt.key + column)
            return _largest_part(limit, length, blocks.queries)

        most = max(1, blocks.heads // times)
        # Each chunk fetches the queries again and has its own part of dq: rather fewer heads than chunks.
        dealt = max((deal_heads(heads, key.shape[1], n) for n in range(most, 0, -1)), key=chunk_of)
        with_ones = (head_dim // LANES + 1) * LANES
        return cls(
            blocks=blocks,
            heads=dealt,
            head_dim=head_dim,
            chunk=chunk_of(dealt),
            value_width=with_ones if with_ones <= machine.mxu else head_dim,
            exp_dtype=machine.exp_dtype(query.dtype),
            machine=machine,
        )

    def visits(self, segments: Int[Array, "batch 1 length"] | None, batch: int) -> tuple[Array, Array]:
        """`schedule`, also without segments."""
        if segments is None:
            return (jnp.zeros(1, jnp.int32),) * 2
        return schedule(segments[:, 0], self.blocks.queries, self.blocks.keys)

    def compiler_params(self, *semantics: Any) -> pltpu.CompilerParams:
        """Order of the grid's axes and the memory it may use."""
        return pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=self.machine.vmem)


def schedule(
    segment_ids: Int[Array, "batch length"], queries: int, keys: int
) -> tuple[Int[Array, " blocks"], Int[Array, " blocks"]]:
    """Which blocks of keys each block of queries visits before its diagonal block.

    Args:
      segment_ids: equal numbers see each other. Contiguous segments are skipped best; any are right.
      queries: rows per block of queries, a divisor of the length.
      keys: rows per block of keys, a divisor of `queries`.

    Returns:
      (first, unmasked), int32[batch * length / queries] each: blocks `first` to `unmasked` need a mask,
      those from `unmasked` up to the diagonal block none. Both count blocks of keys.
    """
    batch, length = segment_ids.shape
    by_query = segment_ids.reshape(batch, length // queries, 1, queries)
    by_key = segment_ids.reshape(batch, 1, length // keys, keys)
    q_low, q_high = by_query.min(-1), by_query.max(-1)
    k_low, k_high = by_key.min(-1), by_key.max(-1)
    block = jnp.arange(length // keys)
    diagonal = (jnp.arange(length // queries) * (queries // keys))[:, None]
    before = block < diagonal
    meets = before & (q_low <= k_high) & (k_low <= q_high)
    first = jnp.where(meets, block, diagonal).min(-1)
    same = (q_low == q_high) & (k_low == k_high) & (q_low == k_low)
    unmasked = jnp.where(before & ~same, block + 1, 0).max(-1)
    unmasked = jnp.clip(unmasked, first, diagonal[:, 0])
    return first.reshape(-1).astype(jnp.int32), unmasked.reshape(-1).astype(jnp.int32)
