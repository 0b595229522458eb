"""How one direction of the decoder's attention is cut; `flash.py` derives it."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Int

from sg4v_jax.kernels.tpu.tiles import LANES, Heads, deal_heads


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How the work of one direction is cut.

    Attributes:
      queries: rows of queries per program; a multiple of `keys` and of `diagonal`.
      keys: rows of keys per step of the inner loop.
      diagonal: rows per strip of the diagonal block.
      heads: query heads per program, at most.
      chunk: keys that lie in VMEM at once, at most; a multiple of `queries`.
    """

    queries: int
    keys: int
    diagonal: int
    heads: int
    chunk: int

    def within(self, length: int) -> "Blocks":
        """The same for rows of `length` (a multiple of 128): no block is longer than that."""
        queries = _largest_part(self.queries, length)
        return dataclasses.replace(
            self,
            queries=queries,
            keys=_largest_part(self.keys, queries),
            diagonal=_largest_part(self.diagonal, queries),
            chunk=_largest_part(self.chunk, length, queries),
        )


def _largest_part(limit: int, whole: int, unit: int = LANES) -> int:
    """The largest divisor of `whole` that is a multiple of `unit` and at most `limit`."""
    return max(n for n in range(unit, max(limit, unit) + 1, unit) if whole % n == 0)


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the kernels need to know besides their operands.

    Attributes:
      forward, backward: the blocks of each direction.
      mxu: width of the matrix unit.
      bf16_exp: whether the exponential can take and give bfloat16.
      vmem: bytes a kernel may use.
      interpret: parameters of Pallas' interpreter, or False to compile.
    """

    forward: Blocks
    backward: Blocks
    mxu: int
    bf16_exp: bool
    vmem: int
    interpret: Any = False


@dataclasses.dataclass(frozen=True)
class Problem:
    """One direction of attention at one shape."""

    blocks: Blocks
    heads: Heads
    head_dim: int
    chunk: int
    value_width: int
    exp_dtype: Any
    vmem: int
    interpret: Any

    @classmethod
    def of(cls, settings: Settings, blocks: Blocks, query: Array, key: Array) -> "Problem":
        """The problem of arrays [batch, heads, length, head_dim]."""
        _, heads, length, head_dim = query.shape
        blocks = blocks.within(length)
        with_ones = (head_dim // LANES + 1) * LANES
        half = settings.bf16_exp and query.dtype == jnp.bfloat16
        return cls(
            blocks=blocks,
            heads=deal_heads(heads, key.shape[1], blocks.heads),
            head_dim=head_dim,
            chunk=blocks.chunk,
            value_width=with_ones if with_ones <= settings.mxu else head_dim,
            exp_dtype=jnp.bfloat16 if half else jnp.float32,
            vmem=settings.vmem,
            interpret=settings.interpret,
        )

    def visits(self, segments: Int[Array, "batch 1 length"] | None, batch: int) -> tuple[Array, Array]:
        """`schedule`, also without segments."""
        if segments is None:
            return (jnp.zeros(1, jnp.int32),) * 2
        return schedule(segments[:, 0], self.blocks.queries, self.blocks.keys)

    def compiler_params(self, *semantics: Any) -> pltpu.CompilerParams:
        """Order of the grid's axes and the memory it may use."""
        return pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=self.vmem)


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
