"""The one table from logical axes to mesh axes.

Parameters name their logical axes where they are created (`models/`); activations name theirs at
`constrain`. Nothing else in the project mentions a mesh axis.
"""

import math

import jax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

# From the slowest network to the fastest: `slices` is the data-centre network between TPU slices.
MESH_AXES = ("slices", "data", "fsdp", "tensor")

RULES: dict[str, str | tuple[str, ...] | None] = {
    # Activations.
    "batch": ("slices", "data", "fsdp"),
    "length": None,
    # Parameters. None lies across `slices` or `data`: there, only gradients are added up.
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
        entries.append(None if axis is None or size % ways(axis, mesh) else RULES[axis])
    return PartitionSpec(*entries)


def ways(axis: str, mesh: jax.sharding.AbstractMesh | jax.sharding.Mesh) -> int:
    """Parts that a logical axis is cut into on `mesh`, where its size divides by them."""
    mesh_axes = RULES[axis]
    names = (mesh_axes,) if isinstance(mesh_axes, str) else mesh_axes or ()
    return math.prod(mesh.shape[name] for name in names)


def sharding(axes: tuple[str | None, ...], shape: tuple[int, ...], mesh: jax.sharding.Mesh) -> NamedSharding:
    """NamedSharding of an array with logical `axes` on `mesh`."""
    return NamedSharding(mesh, spec(axes, shape, mesh))


def constrain(x: Array, axes: tuple[str | None, ...]) -> Array:
    """Pins the sharding of an activation on the current mesh; does nothing without one."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or not mesh.shape_tuple:
        return x
    return jax.lax.with_sharding_constraint(x, spec(axes, x.shape, mesh))


def parts(axis: str, size: int) -> int:
    """Parts that a dimension of `size` with a logical axis is cut into on the current mesh; 1 without one."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or not mesh.shape_tuple or size % ways(axis, mesh):
        return 1
    return ways(axis, mesh)
