"""What the attention kernels share: tiles, their order, and small pieces of layout."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Num

LANES = 128
LOG2_E = 1.4426950408889634
MASKED = -1e30
"""Score of a pair that is masked out: far below any score, but finite, so that no NaN arises."""


class Tile(NamedTuple):
    """A rectangle of scores: `rows` queries from `row` on and `keys` keys from `key` on, of one head."""

    head: int
    row: int
    rows: int
    key: Any
    keys: int
    on_diagonal: bool = False


def in_pipeline(
    tiles: Sequence[Any], begin: Callable[[Any], Any], finish: Callable[[Any, Any], None]
) -> None:
    """Emits `begin` of each tile ahead of `finish` of the tile before, for the compiler to overlap.

    The compiler's scheduler follows the order of the program rather closely: left to itself it runs one
    tile's chain (product, maximum, exponential, product) to its end and the matrix units wait.
    """
    ahead: list[tuple[Any, Any]] = []
    for tile in tiles:
        ahead.append((tile, begin(tile)))
        if len(ahead) > 1:
            finish(*ahead.pop(0))
    for tile, begun in ahead:
        finish(tile, begun)


class Heads(NamedTuple):
    """How heads are dealt to programs.

    Attributes:
      query: query heads per program.
      key: key heads per program.
      programs: programs that share a key head.
    """

    query: int
    key: int
    programs: int

    def of_query(self, head: int) -> int:
        """The key head (within the program) of a query head."""
        return head * self.key // self.query

    def starts_key_head(self, head: int) -> bool:
        """Whether a query head is the program's first of its key head."""
        return head % (self.query // self.key) == 0


def deal_heads(heads: int, kv_heads: int, limit: int) -> Heads:
    """As many query heads per program as `limit` allows and a whole number of programs gives."""
    group = heads // kv_heads
    fits = (n for n in range(limit, 0, -1) if heads % n == 0 and (n % group == 0 or group % n == 0))
    query = next(fits)
    return Heads(query, max(1, query // group), max(1, group // query))


def dot(a: Array, b: Array, over: tuple[int, int]) -> Float[Array, "m n"]:
    """Matrix product with float32 accumulation, contracting axis `over[0]` of a and `over[1]` of b."""
    dimensions = (((over[0],), (over[1],)), ((), ()))
    # Full precision of what comes in: one pass for bfloat16, six for float32.
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)


def lanes(x: Num[Array, "rows 128"], width: int) -> Num[Array, "rows width"]:
    """Widens or narrows rows whose lanes are all equal."""
    if width <= LANES:
        return x[:, :width]
    return jnp.concatenate([x] * pl.cdiv(width, LANES), axis=1)[:, :width]


def as_row(x: Float[Array, "rows 1"] | Float[Array, "rows 128"]) -> Float[Array, "1 rows"]:
    """Turns a column (one lane, or equal lanes) into a row.

    Picks the diagonal of each 128 x 128 square: 10 cycles, where the transposition unit takes 100.
    """
    parts = []
    for start in range(0, x.shape[0], LANES):
        part = x[start : start + LANES]
        square = (part.shape[0], LANES)
        row, lane = (jax.lax.broadcasted_iota(jnp.int32, square, axis) for axis in (0, 1))
        parts.append(jnp.where(row == lane, part, 0).sum(0, keepdims=True)[:, : part.shape[0]])
    return jnp.concatenate(parts, axis=1)


def hide_future(scores: Float[Array, "m n"], query_axis: int) -> Float[Array, "m n"]:
    """Masks the future in a tile on the diagonal.

    With queries on axis 0 the last keys are the queries' own; with queries on axis 1 the first queries
    are the keys' own. Either way only that square is touched.
    """
    n = min(scores.shape)
    query = jax.lax.broadcasted_iota(jnp.int32, (n, n), query_axis)
    key = jax.lax.broadcasted_iota(jnp.int32, (n, n), 1 - query_axis)
    rest = scores.shape[1] - n
    square = scores[:, rest:] if query_axis == 0 else scores[:, :n]
    square = jnp.where(query >= key, square, MASKED)
    if not rest:
        return square
    return jnp.concatenate([scores[:, :rest], square] if query_axis == 0 else [square, scores[:, n:]], axis=1)


def exp2(x: Float[Array, "m n"], dtype: Any) -> Float[Array, "m n"]:
    """2**x, computed in `dtype`."""
    return jnp.exp2(x.astype(dtype))


def loop(low: Any, high: Any, body: Callable[[Any], None]) -> None:
    """`for block in range(low, high): body(block)` with bounds known when it runs."""
    jax.lax.fori_loop(low, high, lambda block, _: body(block), None)


def rows_from(start: Any, size: int) -> Any:
    """A slice of rows whose start is known to be aligned."""
    return pl.ds(start if isinstance(start, int) else pl.multiple_of(start, LANES), size)
