"""Attention of a vision tower on a TPU: all of a few hundred tokens see each other.

Derivation of the blocking
--------------------------
A row of scores (577 floats for ViT-L/14-336) fits in registers and VMEM many times over, so there is
nothing to do online: one program takes all tokens of a few heads of one image, and each head is two
matrix products with a softmax between them (five products with what lies between, backward).

* The operands are read as `[batch, length, heads * head_dim]`, which is how the projections' matrix
  products write them: no transposition, and no padding in memory of 577 tokens to 640 or of head_dim 64
  to 128 lanes.
* With head_dim 64 two heads share 128 lanes, and one of 72 or 80 may lie in two registers. Moving heads
  aside costs as much as a product, so nothing moves: zeroing the other heads' lanes of the *keys* gives this
  head's scores from all of their queries, and results are selected by lane at the end. The matrix unit
  contracts 128 lanes at the price of 64, so this is free, but for heads that lie in two registers where
  the unit is 128 wide.
* Lanes of the values that belong to the other heads are set to one: the sums of the softmax come out of
  the product there.
* A 64-wide contraction (scores) and a 64-wide result (values) use half of the matrix unit, whatever one
  does: the products of a head stream ceil(577 / 16) * 16 rows through 5 (v5e) or 3 (v6e) column blocks
  each. That is the floor, 126 us on v5e for a batch of 8, and the kernel runs at 0.94 of it.
* The tiles of the heads are emitted one ahead (`tiles.in_pipeline`), so that one head's softmax hides
  behind another's products.
* The backward pass keeps scores transposed, [keys, queries], as the decoder's does.

A program takes as many heads as fill whole registers (16 of 72); where that is too much for the memory
(v4), heads are padded to 128 lanes outside. Programs on fewer tokens take more heads.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from sg4v_jax.kernels.tpu.machine import Machine
from sg4v_jax.kernels.tpu.tiles import LANES, LOG2_E, as_row, dot, exp2, in_pipeline, lanes

# Tokens from which on moving heads pays.
MOVES_FROM = 384

# Tokens for which the table of blocks counts heads. Programs on fewer take more heads, to as many rows in
# all (memory); code for more has fewer in a stretch, to as many scores in all (the compiler's time).
TABLE_TOKENS = 640


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the kernels need to know besides their operands.

    Attributes:
      heads: heads of 640 tokens per program, at most, of the forward pass.
      heads_backward: the same of the backward pass.
      rows: queries per tile of the forward pass, a multiple of 16.
      rows_backward: the same of the backward pass, a multiple of 128.
      machine: what the hardware can do.
      head_dim: of the model, where heads come padded; else None.
    """

    heads: int
    heads_backward: int
    rows: int
    rows_backward: int
    machine: Machine
    head_dim: int | None = None

    def layout(self, query: Array, heads: int, limit: int) -> "Layout":
        """The heads of a program, at most `limit` of 640 tokens if they fill whole registers."""
        layout = Layout.of(query, heads, limit)
        # Where the matrix unit is no wider than a register, a head in two doubles each product. Moving it
        # into one takes shifts, which only many rows hide.
        return dataclasses.replace(layout, moves=self.machine.mxu == LANES and layout.length > MOVES_FROM)

    def scale(self, layout: "Layout") -> float:
        """What scores are multiplied by."""
        return (self.head_dim or layout.head_dim) ** -0.5


class Tile(NamedTuple):
    """Queries `row` to `row + rows` of one head of the program."""

    head: int
    row: int
    rows: int


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where the heads of a program lie among its lanes.

    Attributes:
      heads: heads per program.
      head_dim: lanes per head.
      length: tokens.
      stretch: heads in one stretch of straight-line code.
      moves: whether heads that lie in two registers are moved into one.
    """

    heads: int
    head_dim: int
    length: int
    stretch: int
    moves: bool = False

    @classmethod
    def of(cls, query: Array | jax.ShapeDtypeStruct, heads: int, limit: int) -> "Layout":
        """As many heads as `limit` of 640 tokens amount to in a whole number of 128 lanes, or the fewest."""
        length, head_dim = query.shape[1], query.shape[2] // heads
        stretch = max(1, limit * TABLE_TOKENS**2 // max(length, TABLE_TOKENS) ** 2)
        fits = [n for n in range(1, heads) if heads % n == 0 and n * head_dim % LANES == 0]
        fits.append(heads)
        most = max((n for n in fits if n * length <= limit * TABLE_TOKENS), default=fits[0])
        return cls(most, head_dim, length, stretch)

    @property
    def width(self) -> int:
        """Lanes of a program."""
        return self.heads * self.head_dim

    def window(self, head: int) -> slice:
        """The lanes to read for a head: those of the whole registers that hold it, or its own."""
        start, stop = head * self.head_dim, (head + 1) * self.head_dim
        if self.moves and start // LANES < (stop - 1) // LANES:
            return slice(start, stop)
        return slice(start // LANES * LANES, min(-(-stop // LANES) * LANES, self.width))

    def only(self, x: Array, head: int, fill: int) -> Array:
        """Fills the lanes of a head's window that belong to others."""
        if x.shape[1] == self.head_dim:
            return x
        lane = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1) + self.window(head).start
        own = (lane >= head * self.head_dim) & (lane < (head + 1) * self.head_dim)
        return jnp.where(own, x, jnp.asarray(fill, x.dtype))

    def foreign(self, head: int) -> int:
        """The place of a lane of a head's window that is not its own; -1 if all are."""
        window = self.window(head)
        if window.start < head * self.head_dim:
            return 0
        size = window.stop - window.start
        return size - 1 if size > self.head_dim else -1

    def specs(self) -> tuple[pl.BlockSpec, pl.BlockSpec]:
        """Blocks of [batch, length, heads * head_dim] and of [batch, programs, heads, length]."""
        return (
            pl.BlockSpec((None, self.length, self.width), lambda b, g: (b, 0, g)),
            pl.BlockSpec((None, None, self.heads, self.length), lambda b, g: (b, g, 0, 0)),
        )


def attention(
    query: Float[Array, "batch length heads head_dim"],
    key: Float[Array, "batch length heads head_dim"],
    value: Float[Array, "batch length heads head_dim"],
    settings: Settings,
) -> Float[Array, "batch length heads head_dim"]:
    """Attention without a mask, scale 1/sqrt(head_dim), float32 softmax, differentiable.

    Args:
      query, key, value: bfloat16 or float32; as many key heads as query heads.
      settings: blocks and what the hardware can do.

    Returns:
      The attended values, in the dtype of `query`.
    """
    batch, length, heads, head_dim = query.shape
    operands: tuple[Array, ...] = (query, key, value)
    if not fits(settings, query.shape, query.dtype.itemsize):
        padding = -head_dim % LANES
        operands = tuple(jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, padding))) for x in operands)
        settings = dataclasses.replace(settings, head_dim=head_dim)
    flat = (x.reshape(batch, length, -1) for x in operands)
    return _attention(settings, heads, *flat).reshape(operands[0].shape)[..., :head_dim]


def fits(settings: Settings, shape: tuple[int, ...], itemsize: int) -> bool:
    """Whether programs on heads [batch, length, heads, head_dim] as they lie fit into memory.

    The backward pass has eight operands and results, twice as the next ones are fetched meanwhile, three
    float32 sums per head, and four squares of float32 for the two tiles in flight.
    """
    _, length, heads, head_dim = shape
    layout = Layout.of(
        jax.ShapeDtypeStruct((1, length, heads * head_dim), jnp.float32), heads, settings.heads_backward
    )
    squares = 16 * min(settings.rows_backward, length) * length
    return 16 * length * layout.width * itemsize + 12 * length * LANES + squares <= settings.machine.vmem


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(settings: Settings, heads: int, query: Array, key: Array, value: Array) -> Array:
    return _forward(settings, heads, query, key, value)[0]


def _call(
    settings: Settings, layout: Layout, query: Array, kernel: Any, operands: list[Any], outputs: str
) -> Any:
    """Runs `kernel` over images and groups of heads; `outputs` says x (like query) or r (a row per head)."""
    batch, length, lanes = query.shape
    programs = lanes // layout.width
    wide, rows = layout.specs()
    shapes = {
        "x": jax.ShapeDtypeStruct(query.shape, query.dtype),
        "r": jax.ShapeDtypeStruct((batch, programs, layout.heads, length), jnp.float32),
    }
    return pl.pallas_call(
        lambda *refs: kernel(layout, settings.machine.exp_dtype(query.dtype), *refs),
        grid=(batch, programs),
        in_specs=[wide if x.ndim == 3 else rows for x in operands],
        out_specs=[wide if kind == "x" else rows for kind in outputs],
        out_shape=[shapes[kind] for kind in outputs],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=settings.machine.vmem
        ),
        interpret=settings.machine.interpret,
        name=kernel.__name__.strip("_"),
    )(*operands)


def _forward(settings: Settings, heads: int, query: Array, key: Array, value: Array) -> tuple[Array, Any]:
    layout = settings.layout(query, heads, settings.heads)
    kernel = functools.partial(_vit_forward, settings)
    kernel.__name__ = "vit_forward"  # type: ignore[attr-defined]
    out, lse = _call(settings, layout, query, kernel, [query, key, value], "xr")
    return out, (query, key, value, out, lse)


def _backward(settings: Settings, heads: int, residuals: Any, d_out: Array) -> tuple[Array, Array, Array]:
    query, key, value, out, lse = residuals
    layout = settings.layout(query, heads, settings.heads_backward)
    lse = lse.reshape(lse.shape[0], -1, layout.heads, layout.length)
    kernel = functools.partial(_vit_backward, settings)
    kernel.__name__ = "vit_backward"  # type: ignore[attr-defined]
    operands = [query, key, value, out, d_out, lse]
    return tuple(_call(settings, layout, query, kernel, operands, "xxx"))


_attention.defvjp(_forward, _backward)


def _run(layout: Layout, rows: int, begin: Any, finish: Any) -> None:
    """Works on all heads' tiles, of `rows` queries or fewer, if that makes them more alike.

    The compiler's time grows faster than the code; where a program has more heads than a stretch, each
    stretch is in a branch of its own, which is always taken.
    """
    even = pl.cdiv(layout.length, pl.cdiv(layout.length, rows))
    rows = min(rows, pl.cdiv(even, LANES) * LANES)
    for first in range(0, layout.heads, layout.stretch):
        tiles = [
            Tile(head, row, min(rows, layout.length - row))
            for head in range(first, min(first + layout.stretch, layout.heads))
            for row in range(0, layout.length, rows)
        ]
        if layout.heads <= layout.stretch:
            in_pipeline(tiles, begin, finish)
        else:
            pl.when(pl.program_id(0) >= 0)(functools.partial(in_pipeline, tiles, begin, finish))


def _put(layout: Layout, ref: Any, tile: Tile, x: Float[Array, "rows window"]) -> None:
    """Writes a tile's result, all lanes of the head's window, over what comes after the heads before it."""
    window, rows = layout.window(tile.head), slice(tile.row, tile.row + tile.rows)
    own = tile.head * layout.head_dim
    if window.start == own and window.stop - own == layout.head_dim:
        ref[rows, window] = x.astype(ref.dtype)
        return
    for start in range(window.start, window.stop, LANES):
        stop = min(start + LANES, window.stop)
        part = x[:, start - window.start : stop - window.start].astype(ref.dtype)
        if start < own:
            lane = jax.lax.broadcasted_iota(jnp.int32, part.shape, 1) + start
            part = jnp.where(lane < own, ref[rows, start:stop], part)
        ref[rows, start:stop] = part


def _vit_forward(settings: Settings, layout: Layout, exp_dtype: Any, *refs: Any) -> None:
    query, key, value, out, lse = refs
    scale = settings.scale(layout) * LOG2_E

    def scores(tile: Tile) -> Array:
        window, rows = layout.window(tile.head), slice(tile.row, tile.row + tile.rows)
        return dot(query[rows, window], layout.only(key[:, window], tile.head, 0), (1, 1))

    def finish(tile: Tile, scores: Array) -> None:
        # Widened once, and used as it is to the end: making whole registers of a column takes long.
        top = jnp.broadcast_to(scores.max(1, keepdims=True) * scale, (tile.rows, LANES))
        weights = exp2(scores * scale - lanes(top, layout.length), exp_dtype)
        values = layout.only(value[:, layout.window(tile.head)], tile.head, 1)
        place, width = layout.foreign(tile.head), values.shape[1]
        if place < 0 and width < LANES:
            ones = jnp.ones((layout.length, LANES - width), values.dtype)
            values, place = jnp.concatenate([values, ones], axis=1), LANES - 1
        attended = dot(weights.astype(values.dtype), values, (1, 0))
        # The values' foreign lanes are one, so the sums of the weights are in these lanes of the product.
        total = attended[:, place : place + 1] if place >= 0 else _sum(weights)
        attended = attended[:, :width]
        # A division takes ten vector instructions; the logarithm is needed anyway.
        log_total = jnp.log2(jnp.broadcast_to(total, top.shape))
        _put(layout, out, tile, attended * lanes(jnp.exp2(-log_total), attended.shape[1]))
        lse[tile.head : tile.head + 1, tile.row : tile.row + tile.rows] = as_row(top + log_total)

    _run(layout, settings.rows, scores, finish)


def _sum(weights: Array) -> Array:
    return weights.astype(jnp.float32).sum(1, keepdims=True)


def _vit_backward(settings: Settings, layout: Layout, exp_dtype: Any, *refs: Any) -> None:
    query, key, value, out, d_out, lse, *gradients = refs
    scale = settings.scale(layout)
    d_query, d_key, d_value = gradients
    # Of the tiles of one head.
    sums: list[Array] = []

    def products(tile: Tile) -> tuple[Array, Array]:
        window, rows = layout.window(tile.head), slice(tile.row, tile.row + tile.rows)
        scores = dot(layout.only(key[:, window], tile.head, 0), query[rows, window], (1, 1))
        return scores, dot(layout.only(value[:, window], tile.head, 0), d_out[rows, window], (1, 1))

    def finish(tile: Tile, begun: tuple[Array, Array]) -> None:
        scores, d_weights = begun
        head, window, rows = tile.head, layout.window(tile.head), slice(tile.row, tile.row + tile.rows)
        weights = exp2(scores * (scale * LOG2_E) - lse[head : head + 1, rows], exp_dtype)
        product = out[rows, window].astype(jnp.float32) * d_out[rows, window].astype(jnp.float32)
        delta = as_row(layout.only(product, head, 0).sum(1, keepdims=True))
        d_scores = (weights.astype(jnp.float32) * (d_weights - delta)).astype(query.dtype)
        _put(layout, d_query, tile, dot(d_scores, key[:, window], (0, 0)) * scale)
        found = [
            dot(d_scores, query[rows, window], (1, 0)),
            dot(weights.astype(query.dtype), d_out[rows, window], (1, 0)),
        ]
        sums[:] = [a + b for a, b in zip(sums, found, strict=True)] if tile.row else found
        if tile.row + tile.rows == layout.length:
            whole = Tile(head, 0, layout.length)
            _put(layout, d_key, whole, sums[0] * scale)
            _put(layout, d_value, whole, sums[1])

    _run(layout, settings.rows_backward, products, finish)
