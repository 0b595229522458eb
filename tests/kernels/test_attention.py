"""Attention against its definition, written out in float64."""

import jax
import numpy as np
import pytest

from sg4v_jax.kernels import attention as entry

rng = np.random.default_rng(0)


def attention(*arrays, **options):
    """The entry point, on device arrays."""
    return entry.attention(*jax.tree.map(jax.numpy.asarray, arrays), **jax.tree.map(_on_device, options))


def _on_device(option):
    return jax.numpy.asarray(option) if isinstance(option, np.ndarray) else option


def define(query, key, value, visible):
    """One (row, head) at a time; `visible` is bool[batch, q_length, kv_length]."""
    out = np.zeros(query.shape)
    group = query.shape[2] // key.shape[2]
    for b in range(query.shape[0]):
        for h in range(query.shape[2]):
            scores = query[b, :, h] @ key[b, :, h // group].T / np.sqrt(query.shape[-1])
            scores = np.where(visible[b], scores, -np.inf)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            out[b, :, h] = weights / weights.sum(-1, keepdims=True) @ value[b, :, h // group]
    return out


def qkv(batch, q_length, kv_length, heads, kv_heads, head_dim):
    shapes = ((q_length, heads), (kv_length, kv_heads), (kv_length, kv_heads))
    return tuple(rng.normal(size=(batch, *shape, head_dim)).astype(np.float32) for shape in shapes)


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 4, 8), (6, 2, 24), (5, 1, 80)])
@pytest.mark.parametrize("causal", [True, False])
def test_dense_and_causal(heads, kv_heads, head_dim, causal):
    query, key, value = qkv(2, 7, 7, heads, kv_heads, head_dim)
    visible = np.tril(np.ones((7, 7), bool)) if causal else np.ones((7, 7), bool)
    expected = define(query, key, value, np.broadcast_to(visible, (2, 7, 7)))
    np.testing.assert_allclose(attention(query, key, value, causal=causal), expected, atol=1e-5)


def test_segments_are_blind_to_each_other():
    query, key, value = qkv(2, 9, 9, 4, 2, 8)
    segments = np.array([[1, 1, 1, 2, 2, 3, 3, 0, 0], [1] * 9], np.int32)
    same = segments[:, :, None] == segments[:, None, :]
    expected = define(query, key, value, same & np.tril(np.ones((9, 9), bool)))
    found = attention(query, key, value, causal=True, segment_ids=segments)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    changed = key.copy()
    changed[0, :3] += 1  # The first segment of the first row.
    after = attention(query, changed, value, causal=True, segment_ids=segments)
    np.testing.assert_array_equal(np.asarray(found)[0, 3:], np.asarray(after)[0, 3:])


def test_extreme_scores_stay_finite():
    query, key, value = qkv(1, 5, 5, 2, 2, 8)
    found = np.asarray(attention(query * 1e4, key, value, causal=True))
    assert np.isfinite(found).all()
    expected = define(query.astype(np.float64) * 1e4, key, value, np.tril(np.ones((1, 5, 5), bool)))
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_what_cannot_run_is_an_error():
    query, key, value = qkv(1, 4, 4, 3, 2, 8)
    with pytest.raises(ValueError, match="3 query heads do not divide by 2"):
        attention(query, key, value, causal=True)
    query, key, value = qkv(1, 4, 6, 2, 2, 8)
    with pytest.raises(ValueError, match="equal lengths, got 4 queries and 6 keys"):
        attention(query, key, value, causal=True)
    query, key, value = qkv(1, 4, 4, 2, 2, 8)
    with pytest.raises(ValueError, match="'flash' is not one of"):
        attention(query, key, value, causal=True, implementation="flash")
    with pytest.raises(ValueError, match="'tpu' can't run on 'cpu'"):
        attention(query, key, value, causal=True, implementation="tpu")
    segments = np.ones((1, 4), np.int32)
    with pytest.raises(ValueError, match="can't run this: segments without causality have no kernel"):
        attention(query, key, value, causal=False, segment_ids=segments, implementation="interpret")


@pytest.mark.parametrize("kind", ["TPU v5 lite", "TPU v6 lite", "NVIDIA H100 80GB HBM3", "cpu"])
def test_the_device_chooses(kind, monkeypatch):
    """Each kind of device gets its implementation, and the reference where that refuses."""
    monkeypatch.setattr(entry, "device_kind", lambda: kind)
    info = entry.Machine("v5e", 128, False, 100 << 20)
    monkeypatch.setattr(entry, "current_machine", lambda: info)
    x = jax.numpy.zeros((2, 64, 4, 64), "bfloat16")
    chosen = entry._choose(entry.Call(x, x, x, True, None), "auto")
    assert (chosen is None) == (kind == "cpu")
    assert (chosen is entry.gpu.attention) == kind.startswith("NVIDIA")
    integers = jax.numpy.zeros((2, 64, 4, 64), "int8")
    assert entry._choose(entry.Call(integers, integers, integers, True, None), "auto") is None
    nothing = x[:0]
    assert entry._choose(entry.Call(nothing, nothing, nothing, False, None), "auto") is None


@pytest.mark.parametrize(
    ("length", "segmented", "call"),
    [(128, False, "fmhaSoftmaxBackward"), (128, True, "fmhaScaleBiasSoftmaxBackward"), (127, True, None)],
)
def test_the_program_for_a_gpu(length, segmented, call, monkeypatch):
    """Forward and backward, with grouped queries: cuDNN's calls, or the reference where it would refuse."""
    monkeypatch.setattr(entry, "device_kind", lambda: "NVIDIA H100 80GB HBM3")
    # Its version is asked for while the program is written; there is none on this machine.
    monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91000)
    shapes = [jax.ShapeDtypeStruct((2, length, n, 64), "bfloat16") for n in (8, 2, 2)]

    def loss(query, key, value, segments):
        ids = segments if segmented else None
        return entry.attention(query, key, value, causal=True, segment_ids=ids).astype("float32").sum()

    step = jax.jit(jax.grad(loss, (0, 1, 2))).trace(*shapes, jax.ShapeDtypeStruct((2, length), "int32"))
    text = step.lower(lowering_platforms=("cuda",)).as_text()
    assert ("dot_general" in text) == (call is None)
    if call:
        assert call in text and '"CAUSAL' in text.replace("\\22", '"') and "0.125" in text


def test_under_scan():
    """The kernels' own gradients, inside what the models wrap around them."""
    query, key, value = map(jax.numpy.asarray, qkv(1, 128, 128, 2, 2, 64))

    def loss(query, implementation):
        def layer(x, _):
            return x + entry.attention(x, key, value, causal=True, implementation=implementation), None

        return jax.lax.scan(layer, query, None, length=2)[0].sum()

    found = jax.jit(jax.grad(loss), static_argnums=1)(query, "interpret")
    np.testing.assert_allclose(found, jax.grad(loss)(query, "reference"), atol=1e-4)
