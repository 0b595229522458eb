"""The TPU kernels in Pallas' interpreter, which also looks for races, against float64 and autodiff."""

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

few = settings(max_examples=4, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def machine(mxu=128, bf16_exp=False):
    params = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    return Machine("interpreter", mxu, bf16_exp, vmem=4 << 20, interpret=params)


def flash_settings(queries=256, keys=128, heads=2, **options):
    blocks = flash_plan.Blocks(queries, keys, 128, heads)
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


def check(kernel, plain, operands, visible, tolerance=2e-5):
    """Outputs against float64, gradients against autodiff of the reference."""
    query = operands[0]
    (d_out,) = arrays(99, query.shape)
    found, pull = jax.vjp(kernel, *operands)
    np.testing.assert_allclose(found, define(*operands, visible), atol=tolerance, rtol=tolerance)
    _, pull_plain = jax.vjp(plain, *operands)
    for ours, theirs in zip(pull(d_out), pull_plain(d_out), strict=True):
        size = float(jnp.abs(theirs).max())
        np.testing.assert_allclose(ours, theirs, atol=5 * tolerance * max(size, 1))
    assert not races()


def races():
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    found = interpret_pallas_call.races
    return found is not None and found.races_found


@st.composite
def packed(draw):
    """(length, segments or None): segments of any lengths, single tokens too, repeated ids, padding."""
    length = draw(st.sampled_from([1, 129, 300, 384]))
    if draw(st.booleans()):
        return length, None
    cuts = draw(st.lists(st.integers(1, length), max_size=5))
    ids = draw(st.permutations(range(1, 8)))
    segments = np.array([ids[i] for i in np.searchsorted(np.unique(cuts), np.arange(length), side="right")])
    segments[length - draw(st.integers(0, length // 3)) :] = 0
    return length, segments[None].astype(np.int32)


@few
@given(
    packed(),
    st.sampled_from([(2, 2), (4, 2), (3, 1)]),
    st.sampled_from([64, 128, 24]),
    st.sampled_from([128, 256]),
)
def test_flash(rows, heads, head_dim, mxu):
    length, segments = rows
    operands = arrays(0, (1, length, heads[0], head_dim), *[(1, length, heads[1], head_dim)] * 2)
    ids = None if segments is None else jnp.asarray(segments)

    def plain(*x):
        return reference.attention(*x, causal=True, segment_ids=ids)

    kernel = jax.jit(lambda *x: flash.attention(*x, ids, flash_settings(mxu=mxu)))
    check(kernel, plain, operands, causal_mask(segments, 1, length))


def test_flash_in_chunks_of_keys_and_two_programs_per_key_head():
    """A memory so small that keys come in chunks, and more query heads than a program takes."""
    operands = arrays(1, (1, 768, 4, 64), (1, 768, 1, 64), (1, 768, 1, 64))
    segments = np.repeat([[1, 2, 3]], [500, 1, 267], axis=1).astype(np.int32)
    small = flash_settings(heads=2)
    small = flash_plan.Settings(
        small.forward, small.backward, Machine("interpreter", 128, False, 1 << 20, pltpu.InterpretParams())
    )
    shapes = (
        jax.ShapeDtypeStruct((1, 4, 768, 64), jnp.float32),
        jax.ShapeDtypeStruct((1, 1, 768, 64), jnp.float32),
    )
    problem = flash_plan.Problem.of(small.machine, small.backward, *shapes, backward=True)
    assert problem.chunk == 256 and problem.heads.programs == 2
    ids = jnp.asarray(segments)

    def plain(*x):
        return reference.attention(*x, causal=True, segment_ids=ids)

    check(lambda *x: flash.attention(*x, ids, small), plain, operands, causal_mask(segments, 1, 768))


@few
@given(st.sampled_from([(2, 64), (4, 32), (1, 128), (3, 8), (16, 72), (8, 80)]), st.integers(1, 150))
def test_vision(heads, length):
    operands = arrays(2, *[(1, length, *heads)] * 3)

    def plain(*x):
        return reference.attention(*x, causal=False, segment_ids=None)

    kernel = jax.jit(lambda *x: vit.attention(*x, vit.Settings(4, 2, 64, 128, machine())))
    check(kernel, plain, operands, np.ones((1, length, length), bool))


@few
@given(
    st.sampled_from([(4, 4, 64), (4, 2, 128), (8, 1, 32), (6, 3, 16)]),
    st.sampled_from([128, 256]),
    st.lists(st.integers(0, 128), min_size=3, max_size=3),
    st.booleans(),
)
def test_decode(heads, capacity, lengths, quantised):
    """The kernel, and the plain form in blocks and in one, on one layer of a cache of three."""
    query_heads, kv_heads, head_dim = heads
    cache = (3, 3, capacity, kv_heads, head_dim)
    query, new_key, new_value, key, value = arrays(
        3, (3, query_heads, head_dim), *[(3, kv_heads, head_dim)] * 2, *[cache] * 2
    )
    lengths = np.array(lengths, np.int32)
    lengths[0] = capacity
    scales = None
    plain = (key, value)
    if quantised:
        exact = [jnp.abs(x).max(-1) / 127 for x in plain]
        key, value = (jnp.round(x / s[..., None]).astype(jnp.int8) for x, s in zip(plain, exact, strict=True))
        plain = tuple(x * s[..., None] for x, s in zip((key, value), exact, strict=True))
        scales = tuple(s.reshape(3, 3, 1, -1) for s in exact)
    key, value = (x.reshape(3, 3, 1, -1, head_dim) for x in (key, value))
    operands = (query, new_key, new_value, key, value, jnp.int32(1), jnp.asarray(lengths))
    found = [decode.attention(*operands, machine(), rows=256, scales=scales)]
    assert not races()
    found += [blockwise(*operands, scales, block) for block in (128, capacity)]
    both = [
        jnp.concatenate([x[1], new[:, None]], 1) for x, new in zip(plain, (new_key, new_value), strict=True)
    ]
    visible = np.append(np.arange(capacity) < lengths[:, None], np.ones((3, 1), bool), axis=1)[:, None]
    expected = define(query[:, None], *both, visible)[:, 0]
    for result in found:
        np.testing.assert_allclose(result, expected, atol=1e-5)


@pytest.mark.parametrize("implementation", ["interpret", "reference"])
def test_extreme_scores(implementation):
    """Scores of +-1e4: one-hot weights, and gradients that are finite."""
    from sg4v_jax.kernels.attention import attention

    query, key, value = arrays(4, *[(1, 256, 2, 64)] * 3)
    query = query * (1e4 * 8 / 64)
    for causal in (True, False):
        found, pull = jax.vjp(
            lambda *x, c=causal: attention(*x, causal=c, implementation=implementation), query, key, value
        )
        visible = causal_mask(None, 1, 256) if causal else np.ones((1, 256, 256), bool)
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
    operands = arrays(6, *[(1, 384, 2, 64)] * 3)
    segments = jnp.asarray(np.repeat([[1, 2]], [200, 184], axis=1), jnp.int32)
    step = jax.jit(jax.grad(lambda *x: flash.attention(*x, segments, flash_settings()).sum(), (0, 1, 2)))
    for once, again in zip(step(*operands), step(*operands), strict=True):
        np.testing.assert_array_equal(once, again)


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
