"""The least time a program can take on a slice, from what it computes and moves."""

import dataclasses

from sg4v_jax.plan.collectives import Collective
from sg4v_jax.plan.topology import Topology
from sg4v_jax.plan.work import Work


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds of one run of the program on each part of a chip.

    Attributes:
      products: matrix products, at the peak.
      kernels: Pallas kernels, from the cycles of their schedules.
      memory: traffic with HBM.
      hidden: collectives that run beside other work.
      exposed: collectives that nothing runs beside.
    """

    products: float
    kernels: float
    memory: float
    hidden: float
    exposed: float

    @property
    def compute(self) -> float:
        return self.products + self.kernels

    @property
    def bound(self) -> float:
        """No run is faster: compute, memory and network overlap perfectly."""
        return max(self.compute, self.memory, self.hidden + self.exposed)

    @property
    def expected(self) -> float:
        """The same, where collectives that the compiler left alone wait for nothing else."""
        return max(self.compute, self.memory, self.hidden) + self.exposed

    @property
    def limit(self) -> str:
        """What the bound is made of."""
        parts = {"compute": self.compute, "memory": self.memory, "network": self.hidden + self.exposed}
        return max(parts, key=lambda name: parts[name])


def roofline(
    topology: Topology,
    coordinates: list[tuple[int, ...]],
    work: Work,
    collectives: list[Collective],
    kernel_seconds: float,
) -> Roofline:
    """Times of a program on a slice.

    Args:
      topology: the slice.
      coordinates: in the torus, of every device of the mesh.
      work: of one chip; see `work.work`.
      collectives: of the program.
      kernel_seconds: that its Pallas kernels take.
    """
    seconds = {True: 0.0, False: 0.0}
    for collective in collectives:
        group = [coordinates[member] for member in collective.members]
        seconds[collective.hidden] += collective.sent / topology.bandwidth(group)
    return Roofline(
        products=work.product_flops / topology.chip.flops,
        kernels=kernel_seconds,
        memory=work.hbm_bytes / topology.chip.hbm_bandwidth,
        hidden=seconds[True],
        exposed=seconds[False],
    )
