"""Forward pass of the decoder's attention; `flash.py` derives the blocking."""

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


def forward(
    problem: Problem,
    query: Float[Array, "batch heads length head_dim"],
    key: Float[Array, "batch kv_heads length head_dim"],
    value: Float[Array, "batch kv_heads length head_dim"],
    segments: Int[Array, "batch 1 length"] | None,
) -> tuple[Float[Array, "batch heads length head_dim"], Float[Array, "batch heads 1 length"]]:
    """The attended values, and the base-2 log-sum-exp of each row's scores."""
    batch, heads, length, head_dim = query.shape
    blocks, dealt = problem.blocks, problem.heads
    n, h = blocks.queries, dealt.query
    first, unmasked = problem.visits(segments, batch)

    def chunk_of(i: Any, c: Any) -> Any:
        # The chunk of the diagonal first, then backwards; before the start, the first stays.
        return jnp.maximum((i * n) // problem.chunk - c, 0)

    def kv_map(b: Any, g: Any, i: Any, c: Any, *_: Any) -> tuple[Any, ...]:
        return b, g // dealt.programs, chunk_of(i, c), 0

    rows = pl.BlockSpec((None, h, n, head_dim), lambda b, g, i, c, *_: (b, g, i, 0))
    keys = pl.BlockSpec((None, dealt.key, problem.chunk, head_dim), kv_map)
    in_specs, operands = [rows, keys, keys], [query, key, value]
    if segments is not None:
        columns = jnp.broadcast_to(segments.swapaxes(1, 2), (batch, length, LANES))
        in_specs += [
            pl.BlockSpec((None, n, LANES), lambda b, g, i, c, *_: (b, i, 0)),
            pl.BlockSpec((None, 1, problem.chunk), lambda b, g, i, c, *_: (b, 0, chunk_of(i, c))),
        ]
        operands += [columns, segments]
    width = problem.value_width
    scratch = [pltpu.VMEM((h, n, width), jnp.float32), pltpu.VMEM((h, n, LANES), jnp.float32)]
    if width == head_dim:
        scratch.append(pltpu.VMEM((h, n, LANES), jnp.float32))
    return pl.pallas_call(
        lambda *refs: _kernel(problem, segments is not None, refs),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch, heads // h, length // n, length // problem.chunk),
            in_specs=in_specs,
            out_specs=[rows, pl.BlockSpec((None, h, 1, n), lambda b, g, i, c, *_: (b, g, 0, i))],
            scratch_shapes=scratch,
        ),
        out_shape=[
            jax.ShapeDtypeStruct(query.shape, query.dtype),
            jax.ShapeDtypeStruct((batch, heads, 1, length), jnp.float32),
        ],
        compiler_params=problem.compiler_params("parallel", "parallel", "arbitrary", "arbitrary"),
        interpret=problem.machine.interpret,
        name="flash_forward",
    )(first, unmasked, *operands)


def _kernel(problem: Problem, segmented: bool, refs: Any) -> None:
    """One block of queries against one chunk of keys."""
    blocks = problem.blocks
    visits, refs = refs[:2], refs[2:]
    inputs, (out, lse, *state) = (refs[:5], refs[5:]) if segmented else (refs[:3], refs[3:])
    tiles = _Tiles(problem, inputs, state)
    b, i, c = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    last = (i * blocks.queries) // problem.chunk
    start = (last - c) * problem.chunk

    @pl.when(c == 0)
    def diagonal() -> None:
        n = blocks.diagonal
        strips = range(0, blocks.queries, n)
        tiles.run(
            [
                Tile(h, row, n, i * blocks.queries - start, row + n, on_diagonal=True)
                for row in strips
                for h in range(problem.heads.query)
            ],
            fresh=True,
            masked=segmented,
        )

    def visit(block: Any, masked: bool) -> None:
        key = block * blocks.keys - start
        tiles.run(
            [Tile(h, 0, blocks.queries, key, blocks.keys) for h in range(problem.heads.query)],
            fresh=False,
            masked=masked,
        )

    per_chunk = problem.chunk // blocks.keys
    low, high = (last - c) * per_chunk, (last - c + 1) * per_chunk
    own = i * (blocks.queries // blocks.keys)
    unmasked = 0
    if segmented:
        where = b * pl.num_programs(2) + i
        first, unmasked = visits[0][where], visits[1][where]
        loop(jnp.maximum(first, low), jnp.minimum(unmasked, high), lambda block: visit(block, True))
    loop(jnp.maximum(unmasked, low), jnp.minimum(own, high), lambda block: visit(block, False))

    @pl.when(c == pl.num_programs(3) - 1)
    def finish() -> None:
        for h in range(problem.heads.query):
            # A division takes ten vector instructions; the logarithm is needed anyway.
            log_total = jnp.log2(tiles.total(h))
            values = tiles.acc[h][:, : problem.head_dim]
            out[h] = (values * lanes(jnp.exp2(-log_total), problem.head_dim)).astype(out.dtype)
            lse[h] = as_row(tiles.maximum[h] + log_total)


class _Tiles:
    """Online softmax over tiles, with its running state in scratch memory."""

    def __init__(self, problem: Problem, inputs: Any, state: Any):
        self.problem = problem
        self.query, self.key, self.value, *self.segments = inputs
        self.acc, self.maximum, *self.sum = state

    def run(self, tiles: list[Tile], fresh: bool, masked: bool) -> None:
        """Adds tiles to the state; `fresh` sets it instead."""
        in_pipeline(tiles, self._scores, lambda tile, s: self._add(tile, s, fresh, masked))

    def _scores(self, tile: Tile) -> Array:
        keys = self.key[self.problem.heads.of_query(tile.head), rows_from(tile.key, tile.keys)]
        return dot(self.query[tile.head, pl.ds(tile.row, tile.rows)], keys, (1, 1))

    def _add(self, tile: Tile, scores: Array, fresh: bool, masked: bool) -> None:
        rows, keys = pl.ds(tile.row, tile.rows), rows_from(tile.key, tile.keys)
        if masked:
            own, theirs = lanes(self.segments[0][rows], tile.keys), self.segments[1][:, keys]
            scores = jnp.where(own == theirs, scores, MASKED)
        if tile.on_diagonal:
            scores = hide_future(scores, query_axis=0)
        scale = self.problem.head_dim**-0.5 * LOG2_E
        top = jnp.broadcast_to(scores.max(1, keepdims=True) * scale, (tile.rows, LANES))
        if not fresh:
            before = self.maximum[tile.head, rows]
            top = jnp.maximum(before, top)
            shrink = jnp.exp2(before - top)
        self.maximum[tile.head, rows] = top
        weights = exp2(scores * scale - lanes(top, tile.keys), self.problem.exp_dtype)
        value = self.value[self.problem.heads.of_query(tile.head), keys]
        width = self.problem.value_width
        if width > self.problem.head_dim:
            ones = jnp.ones((tile.keys, width - self.problem.head_dim), value.dtype)
            value = jnp.concatenate([value, ones], axis=1)
        values = dot(weights.astype(value.dtype), value, (1, 0))
        if not fresh:
            values += self.acc[tile.head, rows] * lanes(shrink, width)
        self.acc[tile.head, rows] = values
        if self.sum:
            wide = weights.astype(jnp.float32)
            total = sum(wide[:, j : j + LANES] for j in range(0, tile.keys, LANES))
            if not fresh:
                total += self.sum[0][tile.head, rows] * shrink
            self.sum[0][tile.head, rows] = total

    def total(self, head: int) -> Float[Array, "rows 128"]:
        """The sum of each row's weights, in all lanes."""
        d = self.problem.head_dim
        if self.problem.value_width - d >= LANES:
            return self.acc[head][:, d : d + LANES]
        sums = self.sum[0][head].sum(1, keepdims=True) if self.sum else self.acc[head][:, d : d + 1]
        return jnp.broadcast_to(sums, (sums.shape[0], LANES))
