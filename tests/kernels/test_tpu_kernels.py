"""The TPU kernels in Pallas' interpreter, which also looks for races, against float64 and autodiff."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from sg4v_jax.kernels import reference
from sg4v_jax.kernels.decoding import blockwise
from sg4v_jax.kernels.tpu import decode, flash, flash_plan, vit
from sg4v_jax.kernels.tpu.machine import Machine

# Compiling takes seconds and running tenths of one: shapes are few and fixed, what they hold is drawn.
drawn = settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def machine(mxu=128, bf16_exp=False, vmem=4 << 20):
    params = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    return Machine("interpreter", mxu, bf16_exp, vmem=vmem, interpret=params)


def flash_settings(queries=256, keys=128, heads=2, **options):
    blocks = flash_plan.Blocks(queries, keys, 128, 2 * heads)  # Half as many of float32.
    return flash_plan.Settings(blocks, blocks, machine(**options))


def arrays(seed, *shapes, scale=1.0, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(rng.normal(size=shape) * scale, dtype) for shape in shapes)


def define(query, key, value, visible):
    """Attention in float64; rows that see nothing give zeros. `visible` is bool[batch, q, k]."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    group = query.shape[2] // key.shape[2]
    key, value = (np.repeat(x, group, axis=2) for x in (key, value))
    scores = np.einsum("bqhd,bkhd->bhqk", query, key) / np.sqrt(query.shape[-1])
    scores = np.where(visible[:, None], scores, -np.inf)
    top = scores.max(-1, keepdims=True)
    weights = np.where(np.isfinite(scores), np.exp(scores - np.where(np.isfinite(top), top, 0)), 0)
    sums = weights.sum(-1, keepdims=True)
    return np.einsum("bhqk,bkhd->bqhd", weights / np.where(sums, sums, 1), value)


def causal_mask(segments, batch, length):
    mask = np.broadcast_to(np.tril(np.ones((length, length), bool)), (batch, length, length))
    return mask if segments is None else mask & (segments[:, :, None] == segments[:, None, :])


def step(function):
    """Compiled: result and gradients, given the operands, the result's gradient and what else it takes."""

    def run(operands, d_out, *rest):
        found, pull = jax.vjp(lambda *x: function(*x, *rest), *operands)
        return found, pull(d_out)

    return jax.jit(run)


def check(ours, plain, operands, visible, *rest, tolerance=2e-5):
    """Outputs against float64, gradients against autodiff of the reference."""
    (d_out,) = arrays(99, operands[0].shape)
    found, gradients = ours(operands, d_out, *rest)
    size = max(1, float(jnp.abs(operands[2]).max()))
    np.testing.assert_allclose(found, define(*operands, visible), atol=tolerance * size, rtol=tolerance)
    for mine, theirs in zip(gradients, plain(operands, d_out, *rest)[1], strict=True):
        np.testing.assert_allclose(mine, theirs, atol=5 * tolerance * max(float(jnp.abs(theirs).max()), 1))
    assert not races()


def races():
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    found = interpret_pallas_call.races
    return found is not None and found.races_found


@st.composite
def packed(draw, length):
    """int32[length]: segments of any lengths, single tokens, repeated ids, padding, nothing else."""
    cuts = draw(st.lists(st.integers(1, length), max_size=5))
    ids = draw(st.permutations(range(1, 8)))
    segments = np.array([ids[i] for i in np.searchsorted(np.unique(cuts), np.arange(length), side="right")])
    segments[length - draw(st.integers(0, length)) :] = 0
    return segments.astype(np.int32)


@functools.cache
def flash_steps(mxu, heads=2):
    def plain(*x):
        return reference.attention(*x[:3], causal=True, segment_ids=x[3])

    return step(lambda *x: flash.attention(*x, flash_settings(mxu=mxu, heads=heads))), step(plain)


@pytest.mark.parametrize(
    ("length", "heads", "head_dim", "mxu"),
    [(300, (2, 2), 64, 128), (200, (4, 2), 128, 256), (384, (3, 1), 24, 128), (129, (2, 1), 64, 256)],
)
def test_flash(length, heads, head_dim, mxu):
    shapes = ((2, length, heads[0], head_dim), *[(2, length, heads[1], head_dim)] * 2)
    steps = flash_steps(mxu)

    @settings(drawn, max_examples=4)
    @given(st.lists(packed(length), min_size=2, max_size=2), st.sampled_from([0.1, 1, 3]))
    def on_layouts(layouts, scale):
        segments = np.stack(layouts)
        operands = arrays(0, *shapes, scale=scale)
        check(*steps, operands, causal_mask(segments, 2, length), jnp.asarray(segments))

    on_layouts()


@pytest.mark.parametrize("length", [1, 300])
def test_flash_without_segments(length):
    operands = arrays(8, *[(1, length, 2, 64)] * 3)
    check(*flash_steps(128), operands, causal_mask(None, 1, length), None)


def test_flash_in_chunks_of_keys_and_two_programs_per_key_head():
    """A memory so small that keys come in chunks, and more query heads than a program takes."""
    operands = arrays(1, (1, 768, 4, 64), (1, 768, 1, 64), (1, 768, 1, 64))
    segments = np.repeat([[1, 2, 3]], [500, 1, 267], axis=1).astype(np.int32)
    small = flash_settings(heads=2, vmem=1 << 20)
    shapes = (
        jax.ShapeDtypeStruct((1, 4, 768, 64), jnp.float32),
        jax.ShapeDtypeStruct((1, 1, 768, 64), jnp.float32),
    )
    problem = flash_plan.Problem.of(small.machine, small.backward, *shapes, segmented=True, backward=True)
    assert problem.chunk == 256 and problem.heads.programs == 2
    ours = step(lambda *x: flash.attention(*x, small))
    check(ours, flash_steps(128)[1], operands, causal_mask(segments, 1, 768), jnp.asarray(segments))


@pytest.mark.parametrize(
    ("length", "heads"),
    [(150, (2, 64)), (40, (1, 128)), (7, (3, 8)), (50, (16, 72)), (130, (8, 80))],
)
def test_vision(length, heads, monkeypatch):
    """Heads that share registers, fill one, lie in two or are moved; rows in one tile and in several."""
    monkeypatch.setattr(vit, "MOVES_FROM", 100 if heads == (8, 80) else 384)

    def plain(*x):
        return reference.attention(*x, causal=False, segment_ids=None)

    ours = step(lambda *x: vit.attention(*x, vit.Settings(4, 2, 64, 128, machine(vmem=8 << 20))))
    steps = ours, step(plain)
    for seed, scale in ((2, 1), (3, 4)):
        operands = arrays(seed, *[(2, length, *heads)] * 3, scale=scale)
        check(*steps, operands, np.ones((2, length, length), bool))


def test_vision_where_heads_must_be_padded():
    """A memory too small for the sixteen heads of 72 that fill whole registers."""
    small = vit.Settings(4, 2, 64, 128, machine(vmem=9 << 20))
    assert not vit.fits(small, (1, 130, 16, 72), 4) and vit.fits(small, (1, 130, 16, 128), 4)
    operands = arrays(2, *[(1, 130, 16, 72)] * 3)
    found = vit.attention(*operands, small)
    np.testing.assert_allclose(found, define(*operands, np.ones((1, 130, 130), bool)), atol=2e-5)


@pytest.mark.parametrize(
    ("heads", "capacity", "quantised"),
    [((4, 4, 64), 128, False), ((4, 2, 128), 256, True), ((8, 1, 32), 256, False), ((6, 3, 16), 256, True)],
)
def test_decode(heads, capacity, quantised, monkeypatch):
    """The kernel, and the plain form in blocks and in one, on one layer of a cache of three."""
    monkeypatch.setattr(decode, "TILE", 128)  # So that a block has several.
    query_heads, kv_heads, head_dim = heads
    cache = (3, 3, capacity, kv_heads, head_dim)
    query, new_key, new_value, key, value = arrays(
        3, (3, query_heads, head_dim), *[(3, kv_heads, head_dim)] * 2, *[cache] * 2
    )
    scales = None
    plain = (key, value)
    if quantised:
        exact = [jnp.abs(x).max(-1) / 127 for x in plain]
        key, value = (jnp.round(x / s[..., None]).astype(jnp.int8) for x, s in zip(plain, exact, strict=True))
        plain = tuple(x * s[..., None] for x, s in zip((key, value), exact, strict=True))
        scales = tuple(s.reshape(3, 3, 1, -1) for s in exact)
    key, value = (x.reshape(3, 3, 1, -1, head_dim) for x in (key, value))
    operands = (query, new_key, new_value, key, value, jnp.int32(1))
    both = [
        jnp.concatenate([x[1], new[:, None]], 1) for x, new in zip(plain, (new_key, new_value), strict=True)
    ]
    runs = [jax.jit(lambda n: decode.attention(*operands, n, machine(), rows=256, scales=scales))]
    blocks = (1, 128), (3, capacity)
    runs += [jax.jit(lambda n, b=b: blockwise(*operands, n, scales, *b)) for b in blocks]

    @drawn
    @given(
        st.lists(
            st.sampled_from([0, 1, 127, 128, capacity]) | st.integers(0, capacity), min_size=3, max_size=3
        )
    )
    def on_lengths(lengths):
        visible = np.arange(capacity) < np.array(lengths)[:, None]
        visible = np.append(visible, np.ones((3, 1), bool), axis=1)[:, None]
        expected = define(query[:, None], *both, visible)[:, 0]
        for run in runs:
            np.testing.assert_allclose(run(jnp.array(lengths, jnp.int32)), expected, atol=1e-5)
        assert not races()

    on_lengths()


@pytest.mark.parametrize("implementation", ["interpret", "reference"])
def test_extreme_scores(implementation):
    """Scores of +-1e4: one-hot weights, and gradients that are finite."""
    from sg4v_jax.kernels.attention import attention

    query, key, value = arrays(4, *[(1, 256, 2, 64)] * 3)
    query = query * (1e4 * 8 / 64)
    segments = np.repeat([[1, 2, 0]], [100, 1, 155], axis=1).astype(np.int32)
    for causal in (True, False):
        options = {"causal": causal, "segment_ids": jnp.asarray(segments) if causal else None}
        found, pull = jax.vjp(
            lambda *x, o=options: attention(*x, **o, implementation=implementation), query, key, value
        )
        visible = causal_mask(segments, 1, 256) if causal else np.ones((1, 256, 256), bool)
        np.testing.assert_allclose(found, define(query, key, value, visible), atol=2e-2)
        assert all(np.isfinite(gradient).all() for gradient in pull(found))


def test_bfloat16_is_as_good_as_the_reference():
    """Also with the exponential in bfloat16: errors within a factor of two of the reference's."""
    operands = arrays(5, *[(1, 256, 2, 64)] * 3, dtype=jnp.bfloat16)
    exact = define(*operands, causal_mask(None, 1, 256))
    plain = reference.attention(*operands, causal=True, segment_ids=None)
    found = flash.attention(*operands, None, flash_settings(mxu=256, bf16_exp=True))
    assert found.dtype == jnp.bfloat16
    error, allowed = (np.abs(np.asarray(x, np.float64) - exact).mean() for x in (found, plain))
    assert error < 2 * allowed


def test_the_same_twice():
    operands = arrays(6, *[(2, 300, 2, 64)] * 3)
    segments = jnp.asarray(np.repeat([[1, 2]] * 2, [200, 100], axis=1), jnp.int32)
    once, again = (flash_steps(128)[0](operands, operands[0], segments) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, once, again)


def test_schedule_skips_what_it_may_and_nothing_else():
    """Against every pair of positions, on random segments that need not be contiguous."""
    rng = np.random.default_rng(7)
    for _ in range(20):
        ids = rng.integers(1, 4, 16).repeat(rng.integers(16, 100, 16))[:512][None]
        ids = np.pad(ids, ((0, 0), (0, 512 - ids.shape[1]))).astype(np.int32)
        first, unmasked = (np.asarray(x) for x in flash_plan.schedule(jnp.asarray(ids), 128, 64))
        sees = ids[0][:, None] == ids[0][None, :]
        for i in range(4):
            blocks = [sees[i * 128 : i * 128 + 128, j * 64 : j * 64 + 64] for j in range(2 * i)]
            assert not any(block.any() for block in blocks[: first[i]])
            assert all(block.all() for block in blocks[unmasked[i] :])
            assert first[i] <= unmasked[i] <= 2 * i
    packed_ids = np.repeat(np.arange(1, 5), 128)[None].astype(np.int32)
    first, unmasked = flash_plan.schedule(jnp.asarray(packed_ids), 128, 64)
    np.testing.assert_array_equal(first, [0, 2, 4, 6])  # Nothing before the diagonal is visited.
    np.testing.assert_array_equal(unmasked, first)
