"""The kernels compile for every generation of TPU, at the shapes and blocks that ship, and under a mesh.

libtpu compiles without a TPU. It refuses what does not fit into VMEM.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies

from sg4v_jax.kernels.attention import attention
from sg4v_jax.kernels.cycles import target
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
    text = compiled(generation, one, gradient(causal=False), *[heads(2, 577, 4, 64)] * 3)
    assert "vit_forward" in text and "vit_backward" in text
    cache, lengths = heads(4, 2048, 8, 128), ((4,), ("batch",), jnp.int32)
    text = compiled(
        generation, one, lambda *x: attention(*x[:3], causal=False, kv_lengths=x[3]), heads(4, 1, 32, 128),
        cache, cache, lengths,
    )  # fmt: skip
    assert "decode" in text


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
