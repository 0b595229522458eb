"""What options of the TPU compiler do to collectives: a small program under each set, and what hides in it.

    python benchmarks/compiler_options.py --topology v5e-64 --data 2 --fsdp 32
    python benchmarks/compiler_options.py --topology v6e-32 --data 2 --fsdp 16

The program is a scan over four layers of an MLP of 7B's size, 2048 positions a chip, with its gradients; it
compiles in about a minute where a train step takes several. Needs libtpu and no TPU.
"""

import argparse
import os
from typing import Any

# libtpu compiles for TPUs on whatever machine this is.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sg4v_jax.parallel.compiler import OPTIONS
from sg4v_jax.parallel.mesh import make_mesh
from sg4v_jax.plan import hlo, topology
from sg4v_jax.plan.collectives import collectives
from sg4v_jax.plan.roofline import Roofline, roofline
from sg4v_jax.plan.work import work

LAYERS, POSITIONS, WIDTH, INNER = 4, 2048, 4096, 11008
_FUSE = {
    "xla_tpu_enable_async_collective_fusion": "true",
    "xla_tpu_enable_async_collective_fusion_multiple_steps": "true",
    "xla_tpu_overlap_compute_collective_tc": "true",
}
_GATHERS = _FUSE | {
    "xla_enable_async_all_gather": "true",
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",
}
_SCATTERS = _FUSE | {
    "xla_enable_async_reduce_scatter_fusion": "true",
    "xla_tpu_enable_async_collective_fusion_fuse_reduce_scatter": "true",
}
# Gradients of weights whose last axis is sharded are reduced and scattered at once, with half of the bytes.
_LAST_AXIS = {
    "xla_tpu_relayout_group_size_threshold_for_reduce_scatter": "1",
    "xla_tpu_use_minor_sharding_for_major_trivial_input": "true",
}
SETS: dict[str, dict[str, str]] = {
    "none": {},
    "scatter the last axis": _LAST_AXIS,
    "and its layout": _LAST_AXIS | {"xla_tpu_assign_all_reduce_scatter_layout": "true"},
    "fuse gathers": _GATHERS,
    "fuse scatters": _SCATTERS,
    "and with more VMEM": _LAST_AXIS | _SCATTERS | {"xla_tpu_scoped_vmem_limit_kib": "65536"},
    "fuse reductions": _FUSE
    | {
        "xla_enable_async_all_reduce": "true",
        "xla_tpu_enable_async_collective_fusion_fuse_all_reduce": "true",
    },
    "data parallel": {
        "xla_tpu_enable_data_parallel_all_reduce_opt": "true",
        "xla_tpu_data_parallel_opt_different_sized_ops": "true",
    },
    "SparseCores": OPTIONS["TPU v6"],
}


def lowered(mesh: Mesh) -> Any:
    """A step of gradient descent; `fsdp` shards the last axis of `down` and the first of the others."""

    def shape(sizes: tuple[int, ...], dtype: Any, *axes: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=NamedSharding(mesh, PartitionSpec(*axes)))

    weights = {
        "gate": shape((LAYERS, WIDTH, INNER), jnp.float32, None, "fsdp"),
        "up": shape((LAYERS, WIDTH, INNER), jnp.float32, None, "fsdp"),
        "down": shape((LAYERS, INNER, WIDTH), jnp.float32, None, None, "fsdp"),
    }
    inputs = shape((mesh.size, POSITIONS, WIDTH), jnp.bfloat16, ("data", "fsdp"))
    keep = jax.checkpoint_policies.dots_with_no_batch_dims_saveable

    def layer(x: jax.Array, kernels: dict[str, jax.Array]) -> tuple[jax.Array, None]:
        return x + (jax.nn.silu(x @ kernels["gate"]) * (x @ kernels["up"])) @ kernels["down"], None

    def loss(weights: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        cast = jax.tree.map(lambda kernel: kernel.astype(jnp.bfloat16), weights)
        x, _ = jax.lax.scan(jax.checkpoint(layer, policy=keep), x, cast)
        return jnp.sum(x.astype(jnp.float32) ** 2)

    def step(weights: dict[str, jax.Array], x: jax.Array) -> dict[str, jax.Array]:
        return jax.tree.map(lambda kernel, slope: kernel - 0.1 * slope, weights, jax.grad(loss)(weights, x))

    places = jax.tree.map(lambda leaf: leaf.sharding, weights)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return jax.jit(step, donate_argnums=0, out_shardings=places).lower(weights, inputs)


def times(where: topology.Topology, mesh: Mesh, text: str) -> Roofline:
    """What plan says of a compiled program."""
    module = hlo.parse(text)
    coordinates = [tuple(device.coords) for device in mesh.devices.flat]
    return roofline(where, coordinates, work(module), collectives(module), {})


def main() -> None:
    """Prints a row for each set."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--topology", required=True, help="v5e-64")
    parser.add_argument("--data", type=int, default=1)
    parser.add_argument("--fsdp", type=int, default=-1)
    parser.add_argument("--sets", default=",".join(SETS))
    arguments = parser.parse_args()
    where = topology.parse(arguments.topology)
    mesh = make_mesh(data=arguments.data, fsdp=arguments.fsdp, devices=where.devices())
    program = lowered(mesh)
    print("| options | expected, ms | alone, ms |\n|---|--:|--:|")
    for name in arguments.sets.split(","):
        try:
            found = times(where, mesh, program.compile(compiler_options=SETS[name]).as_text())
        except jax.errors.JaxRuntimeError as error:
            print(f"| {name} | {str(error).splitlines()[0][:100]} | |", flush=True)
        else:
            print(f"| {name} | {1e3 * found.expected:.1f} | {1e3 * found.exposed:.1f} |", flush=True)


if __name__ == "__main__":
    main()
