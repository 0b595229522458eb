"""The least time a program can take on a slice, from what it computes and moves."""

import collections
import dataclasses

from sg4v_jax.plan.collectives import Collective
from sg4v_jax.plan.topology import Direction, Topology
from sg4v_jax.plan.work import Work


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds of one run of the program on each part of a chip.

    Attributes:
      products: matrix products, at the peak.
      kernels: Pallas kernels that compute, from the cycles of their schedules.
      memory: traffic with HBM, that of the decoding kernel with its cache included.
      network: all collectives, on the links of the busiest direction inside slices: permutes of both ways
        around run at once.
      hidden: those of them that run beside other work.
      exposed: those that nothing runs beside, one after the other.
      slices: what crosses from slice to slice.
    """

    products: float
    kernels: float
    memory: float
    network: float
    hidden: float
    exposed: float
    slices: float

    @property
    def compute(self) -> float:
        return self.products + self.kernels

    @property
    def bound(self) -> float:
        """No run is faster: compute, memory and the networks overlap perfectly."""
        return max(self._parts.values())

    @property
    def expected(self) -> float:
        """The same, where collectives that the compiler left alone wait for nothing else."""
        return max(self.compute, self.memory, self.hidden, self.slices) + self.exposed

    @property
    def limit(self) -> str:
        """What the bound is made of."""
        return max(self._parts, key=lambda name: self._parts[name])

    @property
    def _parts(self) -> dict[str, float]:
        return {
            "compute": self.compute,
            "memory": self.memory,
            "network": self.network,
            "network between slices": self.slices,
        }


def roofline(
    topology: Topology,
    coordinates: list[tuple[int, ...]],
    work: Work,
    collectives: list[Collective],
    kernel_seconds: dict[str, float],
) -> Roofline:
    """Times of a program on a slice, or on several.

    Args:
      topology: the slice.
      coordinates: in the torus, of every device of a slice, in the mesh's order.
      work: of one chip; see `work.work`.
      collectives: of the program.
      kernel_seconds: that its Pallas kernels take, by name.
    """
    everything: collections.Counter[Direction] = collections.Counter()
    hidden: collections.Counter[Direction] = collections.Counter()
    exposed = between = 0.0
    each = {name: time / max(work.kernels.get(name, 1), 1) for name, time in kernel_seconds.items()}
    for collective in collectives:
        if collective.between_slices:
            between += collective.sent_in(topology.slices)
            continue
        seconds = _seconds(topology, coordinates, collective)
        everything.update(seconds)
        longest = max(seconds.values(), default=0.0)
        alone = 0.0 if collective.hidden else longest
        if collective.beside:
            beside = collective.beside.product_flops / topology.chip.flops
            beside += sum(runs * each.get(name, 0.0) for name, runs in collective.beside.kernels.items())
            alone = max(longest - beside, 0.0)
        exposed += alone
        if longest > alone:
            hidden.update({way: time * (1 - alone / longest) for way, time in seconds.items()})
    memory = work.hbm_bytes / topology.chip.hbm_bandwidth
    return Roofline(
        products=work.product_flops / topology.chip.flops,
        kernels=sum(time for name, time in kernel_seconds.items() if name != "decode"),
        memory=memory + kernel_seconds.get("decode", 0.0),
        network=max(everything.values(), default=0.0),
        hidden=max(hidden.values(), default=0.0),
        exposed=exposed,
        slices=between / topology.chip.dcn_bandwidth,
    )


def _seconds(
    topology: Topology, coordinates: list[tuple[int, ...]], collective: Collective
) -> dict[Direction, float]:
    """How long a collective keeps the links of each direction busy, in a step."""
    if collective.pairs:
        shares = topology.permuting([(coordinates[a], coordinates[b]) for a, b in collective.pairs])
    else:
        shares = topology.gathering([coordinates[member] for member in collective.members])
    each = collective.sent / topology.chip.link_bandwidth
    return {direction: each * share for direction, share in shares.items()}
