"""How much of a device's memory an engine takes, before it takes it."""

import dataclasses
import math
from typing import Any

import jax

# Part of a device's memory left to what programs need while they run.
RESERVE = 0.1
GIB = 1 << 30


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """Bytes per device.

    Attributes:
      parameters: the model.
      slots: keys and values of all slots, and the little else that a slot has; twice with beams, which
        are put in a new order by copying.
      prefill: prompts that are prefilled and wait for slots.
      limit: what a device has, None if nobody knows.
    """

    parameters: int
    slots: int
    prefill: int
    limit: int | None

    def describe(self) -> str:
        """One line for people."""
        parts = f"parameters {_gib(self.parameters)}, slots {_gib(self.slots)}, prefill {_gib(self.prefill)}"
        limit = "" if self.limit is None else f" of {_gib(self.limit)}"
        return f"memory per device: {parts} GiB{limit}"

    def check(self, slots: int, capacity: int) -> None:
        """Raises if it doesn't fit.

        Raises:
          ValueError: naming slots and capacity, and how many would fit.
        """
        if self.limit is None:
            return
        room = int(self.limit * (1 - RESERVE)) - self.parameters - self.prefill
        if self.slots <= room:
            return
        fit = max(room, 0) * slots // self.slots
        advice = f"at most slots={fit} fit" if fit else "not one slot fits: use more devices or int8 weights"
        raise ValueError(
            f"slots={slots} of capacity={capacity} don't fit: {self.describe()}, of which {RESERVE:.0%} stay "
            f"free; {advice}. A lower capacity or kv='int8' makes slots smaller"
        )


def bytes_per_device(shapes: Any, shardings: Any) -> int:
    """Of a tree of arrays or ShapeDtypeStructs, placed by a tree of shardings."""

    def of(leaf: Any, sharding: jax.sharding.Sharding) -> int:
        return math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize

    return sum(jax.tree.leaves(jax.tree.map(of, shapes, shardings)))


def device_limit(mesh: jax.sharding.Mesh) -> int | None:
    """What the devices of a mesh say that they have, if they do."""
    stats = mesh.devices.flat[0].memory_stats()
    return int(stats["bytes_limit"]) if stats and "bytes_limit" in stats else None


def _gib(size: int) -> str:
    return f"{size / GIB:.2f}"
