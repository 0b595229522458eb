"""Backward pass of the decoder's attention; `flash.py` derives the blocking."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from sg4v_jax.kernels.tpu.flash_plan import Problem
from sg4v_jax.kernels.tpu.tiles import (
    LANES,
    LOG2_E,
    MASKED,
    Tile,
    as_row,
    dot,
    exp2,
    hide_future,
    in_pipeline,
    lanes,
    loop,
    rows_from,
)


def backward(
    problem: Problem,
    query: Float[Array, "batch heads length head_dim"],
    key: Float[Array, "batch kv_heads length head_dim"],
    value: Float[Array, "batch kv_heads length head_dim"],
    segments: Int[Array, "batch 1 length"] | None,
    out: Float[Array, "batch heads length head_dim"],
    lse: Float[Array, "batch heads 1 length"],
    d_out: Float[Array, "batch heads length head_dim"],
) -> tuple[Array, Array, Array]:
    """Gradients of query, key and value, from one pass over the scores."""
    batch, heads, length, head_dim = query.shape
    blocks, dealt = problem.blocks, problem.heads
    n, h, chunk, programs = blocks.queries, dealt.query, problem.chunk, dealt.programs
    first, unmasked = problem.visits(segments, batch)
    chunks = length // chunk
    # Rows of the batch, groups of key heads, chunks of keys, programs that share a key head, queries.
    rows = pl.BlockSpec((None, h, n, head_dim), lambda b, g, c, p, i, *_: (b, g * programs + p, i, 0))
    keys = pl.BlockSpec((None, dealt.key, chunk, head_dim), lambda b, g, c, p, i, *_: (b, g, c, 0))
    in_specs = [
        rows,
        keys,
        keys,
        rows,
        rows,
        pl.BlockSpec((None, h, 1, n), lambda b, g, c, p, i, *_: (b, g * programs + p, 0, i)),
    ]
    operands = [query, key, value, out, d_out, lse]
    if segments is not None:
        columns = jnp.broadcast_to(segments.swapaxes(1, 2), (batch, length, LANES))
        in_specs += [
            pl.BlockSpec((None, chunk, LANES), lambda b, g, c, p, i, *_: (b, c, 0)),
            pl.BlockSpec((None, 1, n), lambda b, g, c, p, i, *_: (b, 0, i)),
        ]
        operands += [columns, segments]
    # Each chunk of keys has its part of dq; with one chunk that is all of it.
    partial = query.dtype if chunks == 1 else jnp.float32
    d_query, d_key, d_value = pl.pallas_call(
        lambda *refs: _kernel(problem, segments is not None, refs),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch, heads // h // programs, chunks, programs, length // n),
            in_specs=in_specs,
            out_specs=[
                pl.BlockSpec(
                    (None, None, h, n, head_dim), lambda b, g, c, p, i, *_: (c, b, g * programs + p, i, 0)
                ),
                keys,
                keys,
            ],
            scratch_shapes=[
                pltpu.VMEM((h, n, head_dim), jnp.float32),
                pltpu.VMEM((dealt.key, chunk, head_dim), jnp.float32),
                pltpu.VMEM((dealt.key, chunk, head_dim), jnp.float32),
                pltpu.VMEM((h, 1, n), jnp.float32),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((chunks, *query.shape), partial),
            jax.ShapeDtypeStruct(key.shape, key.dtype),
            jax.ShapeDtypeStruct(value.shape, value.dtype),
        ],
        # Cores that share a chip must not take a chunk each: later ones are seen by fewer queries.
        compiler_params=problem.compiler_params("parallel", "parallel", *["arbitrary"] * 3),
        interpret=problem.machine.interpret,
        name="flash_backward",
    )(first, unmasked, *operands)
    return d_query[0] if chunks == 1 else d_query.sum(0).astype(query.dtype), d_key, d_value


def _kernel(problem: Problem, segmented: bool, refs: Any) -> None:
    """One block of queries against one chunk of keys."""
    blocks, dealt = problem.blocks, problem.heads
    visits, refs = refs[:2], refs[2:]
    inputs, refs = (refs[:8], refs[8:]) if segmented else (refs[:6], refs[6:])
    outputs, scratch = refs[:3], refs[3:]
    tiles = _Tiles(problem, inputs, scratch)
    b, _, c, p, i = (pl.program_id(axis) for axis in range(5))
    per_chunk = problem.chunk // blocks.queries
    start = c * problem.chunk
    mine = i // per_chunk == c
    here = pl.ds(pl.multiple_of((i - c * per_chunk) * blocks.queries, LANES), blocks.queries)

    @pl.when(i // per_chunk >= c)
    def prepare() -> None:
        tiles.sum_deltas()

    if dealt.programs > 1:

        @pl.when(mine & (p == 0))
        def clear() -> None:
            for scratch_ref in (tiles.d_key, tiles.d_value):
                scratch_ref[0, here] = jnp.zeros_like(scratch_ref[0, here])

    @pl.when(mine)
    def diagonal() -> None:
        n = blocks.diagonal
        tiles.run(
            [
                Tile(h, row, blocks.queries - row, i * blocks.queries + row - start, n, on_diagonal=True)
                for row in range(0, blocks.queries, n)
                for h in range(dealt.query)
            ],
            masked=segmented,
        )

    @pl.when(jnp.logical_not(mine))
    def clear_query() -> None:
        tiles.d_query[...] = jnp.zeros_like(tiles.d_query)

    def visit(block: Any, masked: bool) -> None:
        key = block * blocks.keys - start
        tiles.run([Tile(h, 0, blocks.queries, key, blocks.keys) for h in range(dealt.query)], masked=masked)

    per_chunk_keys = problem.chunk // blocks.keys
    low, high = c * per_chunk_keys, (c + 1) * per_chunk_keys
    own = i * (blocks.queries // blocks.keys)
    unmasked = 0
    if segmented:
        where = b * pl.num_programs(4) + i
        first, unmasked = visits[0][where], visits[1][where]
        loop(jnp.maximum(first, low), jnp.minimum(unmasked, high), lambda block: visit(block, True))
    loop(jnp.maximum(unmasked, low), jnp.minimum(own, high), lambda block: visit(block, False))
    scale = problem.head_dim**-0.5
    for h in range(dealt.query):
        outputs[0][h] = (tiles.d_query[h] * scale).astype(outputs[0].dtype)

    @pl.when((i == pl.num_programs(4) - 1) & (p == dealt.programs - 1))
    def flush() -> None:
        def copy(block: Any) -> None:
            rows = rows_from(block * LANES, LANES)
            for h in range(dealt.key):
                outputs[1][h, rows] = (tiles.d_key[h, rows] * scale).astype(outputs[1].dtype)
                outputs[2][h, rows] = tiles.d_value[h, rows].astype(outputs[2].dtype)

        loop(0, problem.chunk // LANES, copy)


class _Tiles:
    """Gradients of tiles, with scores transposed: [keys, queries]."""

    def __init__(self, problem: Problem, inputs: Any, scratch: Any):
        self.problem = problem
        self.query, self.key, self.value, self.out, self.d_out, self.lse, *self.segments = inputs
        self.d_query, self.d_key, self.d_value, self.delta = scratch

    def sum_deltas(self) -> None:
        """delta = sum(out * d_out), what the softmax's normalisation takes off every score's gradient."""
        for h in range(self.problem.heads.query):
            product = self.out[h].astype(jnp.float32) * self.d_out[h].astype(jnp.float32)
            self.delta[h] = as_row(product.sum(1, keepdims=True))

    def run(self, tiles: list[Tile], masked: bool) -> None:
        """Adds tiles to the gradients. A tile on the diagonal is the first to touch its keys, and the
        first strip the first to touch the queries, so these set what others add to."""
        in_pipeline(tiles, self._products, lambda tile, products: self._add(tile, products, masked))

    def _products(self, tile: Tile) -> tuple[Array, Array]:
        rows, keys = pl.ds(tile.row, tile.rows), rows_from(tile.key, tile.keys)
        kv = self.problem.heads.of_query(tile.head)
        scores = dot(self.key[kv, keys], self.query[tile.head, rows], (1, 1))
        return scores, dot(self.value[kv, keys], self.d_out[tile.head, rows], (1, 1))

    def _add(self, tile: Tile, products: tuple[Array, Array], masked: bool) -> None:
        scores, d_weights = products
        rows, keys = pl.ds(tile.row, tile.rows), rows_from(tile.key, tile.keys)
        if masked:
            own, theirs = self.segments[1][:, rows], lanes(self.segments[0][keys], tile.rows)
            scores = jnp.where(own == theirs, scores, MASKED)
        if tile.on_diagonal:
            scores = hide_future(scores, query_axis=1)
        scale = self.problem.head_dim**-0.5 * LOG2_E
        weights = exp2(scores * scale - self.lse[tile.head, :, rows], self.problem.exp_dtype)
        d_scores = weights.astype(jnp.float32) * (d_weights - self.delta[tile.head, :, rows])
        heads = self.problem.heads
        kv, query, d_out = heads.of_query(tile.head), self.query[tile.head, rows], self.d_out[tile.head, rows]
        d_scores = d_scores.astype(query.dtype)
        d_value = dot(weights.astype(query.dtype), d_out, (1, 0))
        d_key = dot(d_scores, query, (1, 0))
        d_query = dot(d_scores, self.key[kv, keys], (0, 0))
        fresh = tile.on_diagonal and heads.programs == 1 and heads.starts_key_head(tile.head)
        _put(self.d_value, (kv, keys), d_value, fresh)
        _put(self.d_key, (kv, keys), d_key, fresh)
        _put(self.d_query, (tile.head, rows), d_query, tile.on_diagonal and tile.row == 0)


def _put(ref: Any, index: Any, x: Array, fresh: bool) -> None:
    ref[index] = x if fresh else ref[index] + x
