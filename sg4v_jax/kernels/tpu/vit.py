"""Attention of a vision tower on a TPU: all of a few hundred tokens see each other.

Derivation of the blocking
--------------------------
A row of scores (577 floats for ViT-L/14-336) fits in registers and VMEM many times over, so there is
nothing to do online: one program takes all tokens of a few heads of one image, and each head is two
matrix products with a softmax between them (five products with what lies between, backward).

* The operands are read as `[batch, length, heads * head_dim]`, which is how the projections' matrix
  products write them: no transposition, and no padding in memory of 577 tokens to 640 or of head_dim 64
  to 128 lanes.
* With head_dim 64 two heads share 128 lanes. Moving one of them aside costs as much as a product, so
  nothing moves: zeroing the other head's lanes of the *keys* gives this head's scores from both heads'
  queries, and results are selected by lane at the end. The matrix unit contracts 128 lanes at the price
  of 64, so this is free.
* Lanes of the values that belong to the other head are set to one: the sums of the softmax come out of
  the product there.
* A 64-wide contraction (scores) and a 64-wide result (values) use half of the matrix unit, whatever one
  does: the products of a head stream ceil(577 / 16) * 16 rows through 5 (v5e) or 3 (v6e) column blocks
  each. That is the floor, 126 us on v5e for a batch of 8, and the kernel runs at 0.94 of it.
* The tiles of the heads are emitted one ahead (`tiles.in_pipeline`), so that one head's softmax hides
  behind another's products.
* The backward pass keeps scores transposed, [keys, queries], as the decoder's does.

Head dimensions that do not divide 128 (72, 80) are cut out by lane and put back: there the shifts hide
behind products that fill more of the matrix unit. A program then takes as many heads as fill whole lanes
(16 of 72); where that is too much for the memory (v4), heads are padded to 128 lanes outside.
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
from sg4v_jax.kernels.tpu.tiles import LANES, LOG2_E, as_row, dot, exp2, in_pipeline


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the kernels need to know besides their operands.

    Attributes:
      heads: heads per program, at most, of the forward pass.
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
    """

    heads: int
    head_dim: int
    length: int

    @classmethod
    def of(cls, query: Array | jax.ShapeDtypeStruct, heads: int, limit: int) -> "Layout":
        """As many heads as `limit` allows in a whole number of 128 lanes, or all heads."""
        head_dim = query.shape[2] // heads
        fits = [n for n in range(1, heads) if heads % n == 0 and n * head_dim % LANES == 0]
        fits.append(heads)
        return cls(max((n for n in fits if n <= limit), default=fits[0]), head_dim, query.shape[1])

    @property
    def sharing(self) -> int:
        """Heads that share 128 lanes and stay there; 1 if each is cut out."""
        return LANES // self.head_dim if LANES % self.head_dim == 0 and self.width % LANES == 0 else 1

    @property
    def width(self) -> int:
        """Lanes of a program."""
        return self.heads * self.head_dim

    def lanes(self, head: int) -> slice:
        """The lanes to read for a head: its own, or those of all heads it shares with."""
        size = self.sharing * self.head_dim
        start = head // self.sharing * size
        return slice(start, start + size)

    def only(self, x: Array, head: int, fill: int) -> Array:
        """Fills the lanes of other heads."""
        if self.sharing == 1:
            return x
        return jnp.where(self._owner(x) == head % self.sharing, x, jnp.asarray(fill, x.dtype))

    def merge(self, parts: list[Array], shift: int = 0) -> Array:
        """From each head's result the lanes of the head `shift` places further on."""
        merged = parts[0]
        for head, part in enumerate(parts[1:], 1):
            merged = jnp.where(self._owner(part) == (head + shift) % self.sharing, part, merged)
        return merged

    def _owner(self, x: Array) -> Array:
        return jax.lax.broadcasted_iota(jnp.int32, x.shape, 1) // self.head_dim

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
    operands = (query, key, value)
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
    layout = Layout.of(query, heads, settings.heads)
    kernel = functools.partial(_vit_forward, settings)
    kernel.__name__ = "vit_forward"  # type: ignore[attr-defined]
    out, lse = _call(settings, layout, query, kernel, [query, key, value], "xr")
    return out, (query, key, value, out, lse)


def _backward(settings: Settings, heads: int, residuals: Any, d_out: Array) -> tuple[Array, Array, Array]:
    query, key, value, out, lse = residuals
    layout = Layout.of(query, heads, settings.heads_backward)
    lse = lse.reshape(lse.shape[0], -1, layout.heads, layout.length)
    kernel = functools.partial(_vit_backward, settings)
    kernel.__name__ = "vit_backward"  # type: ignore[attr-defined]
    operands = [query, key, value, out, d_out, lse]
    return tuple(_call(settings, layout, query, kernel, operands, "xxx"))


_attention.defvjp(_forward, _backward)


def _tiles(layout: Layout, rows: int) -> list[Tile]:
    """All heads' tiles; those of heads that share lanes follow each other."""
    return [
        Tile(head, row, min(rows, layout.length - row))
        for first in range(0, layout.heads, layout.sharing)
        for row in range(0, layout.length, rows)
        for head in range(first, first + layout.sharing)
    ]


def _vit_forward(settings: Settings, layout: Layout, exp_dtype: Any, *refs: Any) -> None:
    query, key, value, out, lse = refs
    scale = settings.scale(layout) * LOG2_E
    waiting: list[tuple[Array, Array]] = []

    def scores(tile: Tile) -> Array:
        lanes = layout.lanes(tile.head)
        return dot(
            query[tile.row : tile.row + tile.rows, lanes], layout.only(key[:, lanes], tile.head, 0), (1, 1)
        )

    def finish(tile: Tile, scores: Array) -> None:
        lanes = layout.lanes(tile.head)
        top = scores.max(1, keepdims=True) * scale
        weights = exp2(scores * scale - top, exp_dtype)
        values = layout.only(value[:, lanes], tile.head, 1)
        if layout.sharing == 1 and layout.head_dim < LANES:
            ones = jnp.ones((layout.length, LANES - layout.head_dim), values.dtype)
            values = jnp.concatenate([values, ones], axis=1)
        attended = dot(weights.astype(values.dtype), values, (1, 0))
        if layout.head_dim >= LANES:
            attended = jnp.concatenate(
                [attended, jnp.broadcast_to(_sum(weights), (tile.rows, LANES))], axis=1
            )
        waiting.append((attended, top))
        if len(waiting) == layout.sharing:
            _store(layout, tile, waiting, out, lse)
            waiting.clear()

    in_pipeline(_tiles(layout, settings.rows), scores, finish)


def _sum(weights: Array) -> Array:
    return weights.astype(jnp.float32).sum(1, keepdims=True)


def _store(layout: Layout, tile: Tile, results: list[tuple[Array, Array]], out: Any, lse: Any) -> None:
    """Divides by the sums and writes the heads that share lanes; `tile` is of the last of them."""
    d, first = layout.head_dim, tile.head - layout.sharing + 1
    rows = slice(tile.row, tile.row + tile.rows)
    attended = [x for x, _ in results]
    if layout.sharing == 1:
        log_total = jnp.log2(attended[0][:, d : d + 1])
        logs = [log_total]
        values = attended[0][:, :d]
    else:
        # A head's sums lie in its neighbour's lanes.
        log_total = jnp.log2(pltpu.roll(layout.merge(attended, shift=1), LANES - d, 1))
        logs = [log_total[:, head * d : head * d + 1] for head in range(layout.sharing)]
        values = layout.merge(attended)
    # A division takes ten vector instructions; the logarithm is needed anyway.
    out[rows, layout.lanes(tile.head)] = (values * jnp.exp2(-log_total)).astype(out.dtype)
    for head, (_, top) in enumerate(results):
        lse[first + head : first + head + 1, rows] = as_row(top + logs[head])


def _vit_backward(settings: Settings, layout: Layout, exp_dtype: Any, *refs: Any) -> None:
    query, key, value, out, d_out, lse, *gradients = refs
    scale = settings.scale(layout)
    # Of the heads that share lanes: a tile's gradients of queries, and the sums of the others'.
    of_queries: list[Array] = []
    of_keys: list[list[Array]] = []

    def products(tile: Tile) -> tuple[Array, Array]:
        lanes, rows = layout.lanes(tile.head), slice(tile.row, tile.row + tile.rows)
        scores = dot(layout.only(key[:, lanes], tile.head, 0), query[rows, lanes], (1, 1))
        return scores, dot(layout.only(value[:, lanes], tile.head, 0), d_out[rows, lanes], (1, 1))

    def finish(tile: Tile, begun: tuple[Array, Array]) -> None:
        scores, d_weights = begun
        head, lanes, rows = tile.head, layout.lanes(tile.head), slice(tile.row, tile.row + tile.rows)
        weights = exp2(scores * (scale * LOG2_E) - lse[head : head + 1, rows], exp_dtype)
        product = out[rows, lanes].astype(jnp.float32) * d_out[rows, lanes].astype(jnp.float32)
        delta = as_row(layout.only(product, head, 0).sum(1, keepdims=True))
        d_scores = (weights.astype(jnp.float32) * (d_weights - delta)).astype(query.dtype)
        of_queries.append(dot(d_scores, key[:, lanes], (0, 0)) * scale)
        found = [
            dot(d_scores, query[rows, lanes], (1, 0)),
            dot(weights.astype(query.dtype), d_out[rows, lanes], (1, 0)),
        ]
        place = head % layout.sharing
        if tile.row == 0:
            of_keys.append(found)
        else:
            of_keys[place] = [a + b for a, b in zip(of_keys[place], found, strict=True)]
        if place < layout.sharing - 1:
            return
        gradients[0][rows, lanes] = layout.merge(of_queries).astype(query.dtype)
        of_queries.clear()
        if tile.row + tile.rows == layout.length:
            d_key, d_value = (layout.merge(list(parts)) for parts in zip(*of_keys, strict=True))
            gradients[1][:, lanes] = (d_key * scale).astype(key.dtype)
            gradients[2][:, lanes] = d_value.astype(value.dtype)
            of_keys.clear()

    in_pipeline(_tiles(layout, settings.rows_backward), products, finish)
