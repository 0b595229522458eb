"""The device mesh."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from sg4v_jax.parallel.rules import MESH_AXES, RULES, ways


def make_mesh(
    slices: int = -1,
    data: int = 1,
    fsdp: int = -1,
    tensor: int = 1,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """A mesh with axes ('slices', 'data', 'fsdp', 'tensor').

    Args:
      slices: TPU slices, which are joined by the data-centre network: each holds a copy of the model
        and sees its own part of the batch, and only gradients cross. -1: as many as the devices are of.
        Devices that know of no slices (CPUs, GPUs) are cut into that many in their order; -1 is 1.
      data: copies of the model in each slice; each sees its own part of the batch.
      fsdp: ways the parameters are sharded; the batch is split over these too.
      tensor: ways each matrix product is split.
      devices: the devices to use; all of them by default.

    Besides `slices`, at most one size may be -1: it takes all devices the others leave.

    Raises:
      ValueError: if the sizes do not multiply to the number of devices, or `slices` is not the number
        of TPU slices that there are.
    """
    devices = jax.devices() if devices is None else list(devices)
    there_are = _num_slices(devices)
    slices = (there_are or 1) if slices == -1 else slices
    sizes = [slices, data, fsdp, tensor]
    if there_are and slices != there_are:
        raise ValueError(
            f"mesh {_shown(sizes)}: the devices are of {there_are} TPU slices; set slices={there_are}, or -1 "
            "for as many as there are (parameters and activations are not split across slices)"
        )
    given = math.prod(size for size in sizes if size != -1)
    fits = sizes.count(-1) <= 1 and all(size >= 1 or size == -1 for size in sizes)
    if fits:
        sizes = [len(devices) // given if size == -1 else size for size in sizes]
        fits = math.prod(sizes) == len(devices)
    if not fits:
        raise ValueError(
            f"mesh {_shown([slices, data, fsdp, tensor])} does not fit {len(devices)} devices; use sizes >= "
            "1 and at most one -1 (= the rest)"
        )
    # Axis types are always explicit: JAX's default changed between the versions supported here.
    return Mesh(_arrange(sizes, devices), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def row_shard(mesh: Mesh) -> tuple[int, int]:
    """(index, count): which part of a batch's rows this process reads.

    Processes whose devices hold the same rows, as where the tensor axis spans several, are one reader.

    Raises:
      ValueError: if what two processes hold overlaps without being the same.
    """
    sharding = NamedSharding(mesh, PartitionSpec(RULES["batch"]))
    held: dict[int, set[int]] = {}
    device: Any
    for device, (rows,) in sharding.devices_indices_map((ways("batch", mesh),)).items():
        held.setdefault(device.process_index, set()).add(rows.start or 0)
    parts = sorted({tuple(sorted(rows)) for rows in held.values()})
    if sum(map(len, parts)) != ways("batch", mesh) or len({len(part) for part in parts}) > 1:
        raise ValueError(
            f"mesh {_shown(list(mesh.shape.values()))}: the rows of a batch can't be divided among its "
            f"{len(held)} processes; make tensor divide the {mesh.local_mesh.size} devices of a process, or "
            "be a multiple of them"
        )
    return parts.index(tuple(sorted(held[jax.process_index()]))), len(parts)


def _num_slices(devices: Sequence[jax.Device]) -> int | None:
    """TPU slices that `devices` are of; None for what knows of none."""
    if devices[0].platform != "tpu":
        return None  # GPUs have the attribute too, where it stands for a host.
    return len({getattr(device, "slice_index", 0) for device in devices})


def _arrange(sizes: list[int], devices: Sequence[jax.Device]) -> np.ndarray:
    """Devices so that neighbours on inner axes are neighbours in the network."""
    slices, *inner = sizes
    # Without splitting, a 4x4x4 torus has no axis of 32.
    if slices == 1:
        return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    if _num_slices(devices) is None:
        return np.asarray(devices).reshape(sizes)
    return mesh_utils.create_hybrid_device_mesh(
        [1, *inner], [slices, 1, 1, 1], devices, allow_split_physical_axes=True
    )


def _shown(sizes: Sequence[int]) -> str:
    return " x ".join(f"{axis}={size}" for axis, size in zip(MESH_AXES, sizes, strict=True))
