"""TPU generations, slices, and the compiler's description of them.

`libtpu` compiles for slices it has never seen (`jax.experimental.topologies`). Peaks and bandwidths
are Google's published ones (cloud.google.com/tpu/docs, pages of each generation), per chip; those of the
data-centre network are a host's cards shared by its chips, of which v4 and v5p have four to a host
(jax-ml.github.io/scaling-book, "TPUs").
"""

import collections
import dataclasses
import math
import os
import re
from collections.abc import Sequence
from typing import Any

import jax

from sg4v_jax.kernels.cycles.target import ENVIRONMENT, GENERATIONS

GIB = 2**30

# Of a link: the axis of the torus, and 1 or -1.
Direction = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Chip:
    """One generation of TPU.

    Attributes:
      name: as in topologies, `v5e`.
      hbm_bytes: memory of a chip that the compiler gives to programs; the rest is the system's.
      flops: bfloat16 FLOP/s of a chip.
      hbm_bandwidth: bytes/s between a chip and its memory.
      ici_bandwidth: bytes/s that a chip sends to its neighbours, over all links.
      dcn_bandwidth: bytes/s that a chip sends to other slices, its part of what the host's cards do.
      dims: of the torus, 2 or 3.
      cores: TensorCores of a chip; the suffix of an accelerator type counts these on v4 and v5p.
    """

    name: str
    hbm_bytes: int
    flops: float
    hbm_bandwidth: float
    ici_bandwidth: float
    dcn_bandwidth: float
    dims: int
    cores: int

    @property
    def link_bandwidth(self) -> float:
        """Bytes/s of one link, in one direction."""
        return self.ici_bandwidth / (2 * self.dims)


def _chip(name: str, hbm_gib: float, ici_bandwidth: float, dcn_bandwidth: float, dims: int) -> Chip:
    """A chip whose speed is that which the cycle counter goes by."""
    known = GENERATIONS[name]
    memory, speed = int(hbm_gib * GIB), (known.peak, known.bandwidth)
    return Chip(name, memory, *speed, ici_bandwidth, dcn_bandwidth, dims, known.cores)


CHIPS = {
    chip.name: chip
    for chip in (
        _chip("v4", 30.75, 300e9, 6.25e9, 3),
        _chip("v5e", 15.75, 200e9, 3.125e9, 2),
        _chip("v5p", 95.73, 600e9, 6.25e9, 3),
        _chip("v6e", 31.24, 400e9, 12.5e9, 2),
    )
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """A slice, or several alike: a generation, its grid of chips, and how many there are.

    Attributes:
      chip: its generation.
      grid: chips of a slice along each dimension of its torus.
      slices: that the data-centre network joins.
    """

    chip: Chip
    grid: tuple[int, ...]
    slices: int = 1

    @property
    def num_chips(self) -> int:
        return self.slices * math.prod(self.grid)

    @property
    def name(self) -> str:
        """`v5e:8x8`, as the compiler calls a slice; `2xv5e:8x8` for two of them."""
        several = f"{self.slices}x" if self.slices > 1 else ""
        return f"{several}{self.chip.name}:{'x'.join(map(str, self.grid))}"

    def wraps(self, axis: int) -> bool:
        """Whether the ends of an axis are linked: whole cubes of 4x4x4, or 16 chips on v5e and v6e."""
        if self.chip.dims == 3:
            return all(size % 4 == 0 for size in self.grid)
        return self.grid[axis] == 16

    def gathering(self, coordinates: Sequence[Sequence[int]]) -> dict[Direction, float]:
        """The share of what a chip sends that goes each way, where a group gathers or reduces.

        Every axis that the group spans adds its links: two where they close a ring, one on a line, whose
        ends have no second one and are what everybody waits for.

        Args:
          coordinates: of the group's chips in the torus.
        """
        links = {}
        for axis, size in enumerate(self.grid):
            extent = len({chip[axis] for chip in coordinates})
            if extent > 1:
                links[axis] = 2 if extent == size > 2 and self.wraps(axis) else 1
        ways = [(axis, sign) for axis in links or (0,) for sign in (1, -1)]
        return dict.fromkeys(ways, 1 / max(sum(links.values()), 1))

    def permuting(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> dict[Direction, float]:
        """How much of what a chip sends each link of a direction carries on average, when chips permute.

        Everything takes the shortest way, half of it each way round where both are as long.

        Args:
          pairs: coordinates of all sources and targets.
        """
        hops: collections.Counter[Direction] = collections.Counter()
        for axis, size in enumerate(self.grid):
            for source, target in pairs:
                steps = target[axis] - source[axis]
                for sign, count in _hops(steps, size if self.wraps(axis) else 0).items():
                    hops[axis, sign] += count
        return {way: count / self._links(way[0]) for way, count in hops.items()}

    def _links(self, axis: int) -> int:
        """Links of a slice along an axis, in one direction."""
        size, chips = self.grid[axis], math.prod(self.grid)
        return chips if self.wraps(axis) else chips * (size - 1) // size

    def devices(self) -> list[jax.Device]:
        """The compiler's devices, which can be compiled for and nothing else.

        Raises:
          RuntimeError: `libtpu` isn't installed.
          ValueError: there is no such slice.
        """
        # libtpu reads these when it is loaded: without them it looks for a TPU, and for the cloud.
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        from jax.experimental import topologies

        # One device to a chip, as on real slices: v4 and v5p have two cores that work as one.
        options: dict[str, Any] = {"chip_config_name": "megacore"} if self.chip.name == "v4" else {}
        if self.slices > 1:
            options["num_slices"] = self.slices
        name = dataclasses.replace(self, slices=1).name
        try:
            description = topologies.get_topology_desc(name, platform="tpu", **options)
        except Exception as error:  # Whatever the plug-in raises, which differs between versions.
            if "libtpu" in str(error) or "Unable to initialize" in str(error):
                raise RuntimeError(f"no TPU compiler: pip install libtpu ({error})") from error
            raise ValueError(f"the TPU compiler knows no topology {self.name}: {error}") from error
        return list(description.devices)


def parse(text: str) -> Topology:
    """A topology from `v5e:8x8`, or from an accelerator type like `v5p-128`; `2xv5e-64` are two slices.

    Raises:
      ValueError: naming what is known.
    """
    found = re.fullmatch(r"(?:([1-9]\d*)x)?(v\w+?)(?::(\d+(?:x\d+)+)|-(\d+))", text)
    if not found or found[2].replace("litepod", "e") not in CHIPS:
        known = ", ".join(CHIPS)
        raise ValueError(f"topology {text!r} is neither like v5e:8x8 nor like v5p-128, of {known}")
    chip, slices = CHIPS[found[2].replace("litepod", "e")], int(found[1] or 1)
    if found[3]:
        grid = tuple(map(int, found[3].split("x")))
        if len(grid) != chip.dims:
            raise ValueError(f"topology {text!r}: {chip.name} has {chip.dims} dimensions")
        return Topology(chip, grid, slices)
    chips, rest = divmod(int(found[4]), chip.cores)
    if rest or chips & (chips - 1) or not chips:
        raise ValueError(f"topology {text!r}: the number of chips is no power of two; give the grid")
    return Topology(chip, _grid(chips, chip.dims), slices)


def _hops(steps: int, ring: int) -> dict[int, int]:
    """Links of each sign that lie on the way to a chip so many steps on, in a ring of so many (0: a line)."""
    if ring:
        steps %= ring
        if 2 * steps == ring:
            return {1: steps // 2, -1: steps // 2}
        if 2 * steps > ring:
            steps -= ring
    return {1 if steps > 0 else -1: abs(steps)} if steps else {}


def _grid(chips: int, dims: int) -> tuple[int, ...]:
    """The most compact grid, smallest dimension first and ones last: 2x2x1, 4x4 or 2x2x4."""
    power = chips.bit_length() - 1
    sizes = [2 ** ((power + dim) // dims) for dim in range(dims)]
    return tuple(sorted(sizes, key=lambda size: size == 1))
