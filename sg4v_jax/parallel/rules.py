"""The one table from logical axes to mesh axes.

Parameters name their logical axes where they are created (`models/`); activations name theirs at
`constrain`. Nothing else in the project mentions a mesh axis.
"""

import math

import jax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

MESH_AXES = ("data", "fsdp", "tensor")

RULES: dict[str, str | tuple[str, ...] | None] = {
    # Activations.
    "batch": ("data", "fsdp"),
    "length": None,
    # Parameters.
    "layers": None,
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
    "vocab": "tensor",
    # Rows of the embedding table. It is stored over all devices and gathered over `fsdp` where it is
    # used (`models.llama`). Splitting its width makes XLA rematerialise it in the backward pass.
    "table": ("tensor", "fsdp"),
}


def spec(
    axes: tuple[str | None, ...], shape: tuple[int, ...], mesh: jax.sharding.AbstractMesh | jax.sharding.Mesh
) -> PartitionSpec:
    """PartitionSpec of an array with logical `axes`.

    Missing leading axes are stacked layers. A dimension that does not divide by its mesh axes is
    replicated: correct everywhere, and it only happens to arrays that are small or oddly sized.
    """
    axes = ("layers",) * (len(shape) - len(axes)) + axes
    entries = []
    for axis, size in zip(axes, shape, strict=True):
        mesh_axes = None if axis is None else RULES[axis]
        names = (mesh_axes,) if isinstance(mesh_axes, str) else mesh_axes or ()
        divides = size % math.prod(mesh.shape[name] for name in names) == 0
        entries.append(mesh_axes if divides else None)
    return PartitionSpec(*entries)


def sharding(axes: tuple[str | None, ...], shape: tuple[int, ...], mesh: jax.sharding.Mesh) -> NamedSharding:
    """NamedSharding of an array with logical `axes` on `mesh`."""
    return NamedSharding(mesh, spec(axes, shape, mesh))


def constrain(x: Array, axes: tuple[str | None, ...]) -> Array:
    """Pins the sharding of an activation on the current mesh; does nothing without one."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or not mesh.shape_tuple:
        return x
    return jax.lax.with_sharding_constraint(x, spec(axes, x.shape, mesh))
