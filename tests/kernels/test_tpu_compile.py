"""The kernels compile for every generation of TPU, at the shapes and blocks that ship, and under a mesh.

libtpu compiles without a TPU. It refuses what does not fit into VMEM.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental import topologies
from jax.experimental.layout import Format, Layout

from sg4v_jax.kernels.attention import attention
from sg4v_jax.kernels.cycles import target
from sg4v_jax.kernels.decoding import CACHE_AXES, decode_attention
from sg4v_jax.models.cache import KVCache
from sg4v_jax.models.config import TextConfig
from sg4v_jax.models.llama import Llama
from sg4v_jax.parallel.rules import MESH_AXES, sharding

target.prepare()


def devices(generation, count):
    machine = target.GENERATIONS[generation]
    options = {"chip_config_name": "megacore"} if generation == "v4" else {}
    topology = topologies.get_topology_desc(platform="tpu", topology_name=machine.topology, **options)
    return np.array(topology.devices[:count])


def compiled(generation, shape, function, *arguments):
    """Compiles on a mesh of `shape` (data, fsdp, tensor); each argument is (shape, logical axes, dtype)."""
    axis_types = (jax.sharding.AxisType.Auto,) * len(MESH_AXES)
    mesh = jax.sharding.Mesh(
        devices(generation, np.prod(shape)).reshape(1, *shape), MESH_AXES, axis_types=axis_types
    )
    specs = [jax.ShapeDtypeStruct(s, d, sharding=sharding(axes, s, mesh)) for s, axes, d in arguments]
    with jax.set_mesh(mesh):
        return jax.jit(function).lower(*specs).compile().as_text()


def heads(batch, length, count, head_dim):
    return (batch, length, count, head_dim), ("batch", "length", "heads", "head_dim"), jnp.bfloat16


def gradient(**options):
    return jax.grad(lambda *x: attention(*x, **options).astype(jnp.float32).sum(), (0, 1, 2))


@pytest.mark.slow
@pytest.mark.parametrize("generation", ["v4", "v5e", "v5p", "v6e"])
def test_compiles(generation):
    """One device: packed decoder with grouped queries in scan and checkpoint, vision tower, decoding."""

    def decoder(query, key, value, segments):
        @jax.checkpoint
        def layer(x, _):
            return attention(x, key, value, causal=True, segment_ids=segments), None

        def loss(query):
            return jax.lax.scan(layer, query, None, length=2)[0].astype(jnp.float32).sum()

        return jax.grad(loss)(query)

    one = (1, 1, 1)
    query, key = heads(1, 1024, 8, 128), heads(1, 1024, 2, 128)
    text = compiled(generation, one, decoder, query, key, key, ((1, 1024), ("batch", "length"), jnp.int32))
    assert "flash_forward" in text and "flash_backward" in text
    # CLIP's heads, which share lanes, and the longest rows that the kernel is counted on.
    for operand in (heads(2, 577, 4, 64), heads(1, 1025, 1, 128)):
        text = compiled(generation, one, gradient(causal=False), *[operand] * 3)
        assert "vit_forward" in text and "vit_backward" in text
    new = (4, 32, 128), ("batch", "heads", "head_dim"), jnp.bfloat16
    lengths = (4,), ("batch",), jnp.int32
    for dtype in (jnp.bfloat16, jnp.int8):
        cache = (2, 4, 1, 512 * 32, 128), CACHE_AXES, dtype
        scales = [] if dtype == jnp.bfloat16 else [((2, 4, 1, 512 * 32), CACHE_AXES[:4], jnp.float32)] * 2

        def step(*x):
            return decode_attention(*x[:5], jnp.int32(1), x[5], x[6:] or None)

        assert "tpu_custom_call" in compiled(
            generation, one, step, *[new] * 3, cache, cache, lengths, *scales
        )


def test_long_rows_fit_into_memory():
    """32k positions: the keys come in chunks."""
    text = compiled("v5e", (1, 1, 1), lambda *x: attention(*x, causal=True), *[heads(1, 32768, 2, 128)] * 3)
    assert "flash_forward" in text


def test_on_a_mesh_nothing_is_gathered():
    """Batch over fsdp, heads over tensor; two key heads that four ways don't divide are repeated."""
    rows = heads(4, 256, 4, 128)
    text = compiled("v5e", (1, 2, 2), gradient(causal=True), *[rows] * 3)
    assert "flash_backward" in text and "all-gather" not in text
    few = heads(4, 256, 2, 128)
    text = compiled("v5e", (1, 1, 4), lambda *x: attention(*x, causal=True), rows, few, few)
    assert "flash_forward" in text


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_decoding_copies_nothing_of_the_cache(dtype):
    """A decoder's step with few key heads per device: the kernel reads the cache where it lies."""
    config = TextConfig(
        vocab_size=512, hidden_size=1024, intermediate_size=1024, num_layers=2, num_heads=8, num_kv_heads=4
    )
    axis_types = (jax.sharding.AxisType.Auto,) * len(MESH_AXES)
    mesh = jax.sharding.Mesh(devices("v5e", 2).reshape(1, 1, 1, 2), MESH_AXES, axis_types=axis_types)
    model = nnx.eval_shape(lambda: Llama(config, nnx.Rngs(params=0)))
    graphdef, params = nnx.split(model)

    def place(leaf, axes=()):
        leaf_dtype = jnp.bfloat16 if leaf.ndim > 1 and leaf.dtype == jnp.float32 and not axes else leaf.dtype
        spec_ = sharding(axes or (None,) * leaf.ndim, leaf.shape, mesh)
        return jax.ShapeDtypeStruct(leaf.shape, leaf_dtype, sharding=spec_)

    with jax.set_mesh(mesh):
        cache = jax.eval_shape(lambda: KVCache.empty(config, 16, 4096, dtype))
        axes = {5: CACHE_AXES, 4: CACHE_AXES[:4], 1: ("batch",)}
        cache = jax.tree.map(lambda leaf: place(leaf, axes[leaf.ndim]), cache)
        params = jax.tree.map(place, nnx.to_pure_dict(params))
        x = place(jax.ShapeDtypeStruct((16, 1, 1024), jnp.float32))
        active = jax.ShapeDtypeStruct((16,), jnp.int32)
        layouts = jax.tree.map(lambda leaf: Format(Layout.AUTO, leaf.sharding), params)
        params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)
        places = jax.tree.map(lambda leaf: leaf.sharding, cache)
        step = jax.jit(
            lambda params, x, cache, active: nnx.merge(graphdef, params).decode(x, cache, active),
            donate_argnums=2,
            # Weights lie as the program wants them, which is the engine's way too.
            in_shardings=(layouts, None, places, None),
            out_shardings=(None, places),
        )
        program = step.lower(params, x, cache, active).compile()
    assert "tpu_custom_call" in program.as_text()
    one_layer = cache.key.size // 2 // 2 * cache.key.dtype.itemsize
    assert program.memory_analysis().temp_size_in_bytes < one_layer
    assert program.memory_analysis().alias_size_in_bytes >= 4 * one_layer
