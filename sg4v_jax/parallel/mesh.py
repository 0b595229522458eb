"""The device mesh."""

import math

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from sg4v_jax.parallel.rules import MESH_AXES


def make_mesh(
    data: int = 1, fsdp: int = -1, tensor: int = 1, devices: list[jax.Device] | None = None
) -> Mesh:
    """A mesh with axes ('data', 'fsdp', 'tensor').

    Args:
      data: copies of the model; each sees its own part of the batch.
      fsdp: ways the parameters are sharded; the batch is split over these too.
      tensor: ways each matrix product is split.
      devices: the devices to use; all of them by default.

    At most one size may be -1: it takes all devices the others leave.

    Raises:
      ValueError: if the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [data, fsdp, tensor]
    given = math.prod(size for size in sizes if size != -1)
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes) or len(devices) % given:
        raise ValueError(_message(sizes, len(devices)))
    sizes = [len(devices) // given if size == -1 else size for size in sizes]
    if math.prod(sizes) != len(devices):
        raise ValueError(_message(sizes, len(devices)))
    # Axis types are always explicit: JAX's default changed between the versions supported here.
    return jax.make_mesh(
        tuple(sizes), MESH_AXES, axis_types=(AxisType.Auto,) * 3, devices=list(np.asarray(devices).flat)
    )


def _message(sizes: list[int], num_devices: int) -> str:
    shown = " x ".join(f"{axis}={size}" for axis, size in zip(MESH_AXES, sizes, strict=True))
    return f"mesh {shown} does not fit {num_devices} devices; use sizes >= 1 and at most one -1 (= the rest)"
