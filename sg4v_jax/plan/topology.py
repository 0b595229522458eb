"""TPU generations, slices, and the compiler's description of them.

`libtpu` compiles for a slice it has never seen (`jax.experimental.topologies`). Peaks and bandwidths
are Google's published ones (cloud.google.com/tpu/docs, pages of each generation), per chip.
"""

import dataclasses
import math
import os
import re
from typing import Any

import jax

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One generation of TPU.

    Attributes:
      name: as in topologies, `v5e`.
      hbm_bytes: memory of a chip.
      flops: bfloat16 FLOP/s of a chip.
      hbm_bandwidth: bytes/s between a chip and its memory.
      ici_bandwidth: bytes/s that a chip sends to its neighbours, over all links.
      dims: of the torus, 2 or 3.
      cores: TensorCores of a chip; the suffix of an accelerator type counts these on v4 and v5p.
    """

    name: str
    hbm_bytes: int
    flops: float
    hbm_bandwidth: float
    ici_bandwidth: float
    dims: int
    cores: int


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", 32 * GIB, 275e12, 1228e9, 300e9, 3, 2),
        Chip("v5e", 16 * GIB, 197e12, 819e9, 200e9, 2, 1),
        Chip("v5p", 95 * GIB, 459e12, 2765e9, 600e9, 3, 2),
        Chip("v6e", 32 * GIB, 918e12, 1638e9, 448e9, 2, 1),
    )
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """A slice: a generation and its grid of chips.

    Attributes:
      chip: its generation.
      grid: chips along each dimension of the torus.
    """

    chip: Chip
    grid: tuple[int, ...]

    @property
    def num_chips(self) -> int:
        return math.prod(self.grid)

    @property
    def name(self) -> str:
        """As the compiler calls it: `v5e:8x8`."""
        return f"{self.chip.name}:{'x'.join(map(str, self.grid))}"

    def devices(self) -> list[jax.Device]:
        """The compiler's devices, which can be compiled for and nothing else.

        Raises:
          RuntimeError: `libtpu` isn't installed.
          ValueError: there is no such slice.
        """
        _prepare_libtpu()
        from jax.experimental import topologies

        # One device to a chip, as on real slices: v4 and v5p have two cores that work as one.
        options = {"chip_config_name": "megacore"} if self.chip.name == "v4" else {}
        try:
            description = topologies.get_topology_desc(self.name, platform="tpu", **options)
        except Exception as error:  # Whatever the plug-in raises, which differs between versions.
            if "libtpu" in str(error) or "Unable to initialize" in str(error):
                raise RuntimeError(f"no TPU compiler: pip install libtpu ({error})") from error
            raise ValueError(f"the TPU compiler knows no topology {self.name}: {error}") from error
        return list(description.devices)


def parse(text: str) -> Topology:
    """A topology from `v5e:8x8`, or from an accelerator type like `v5p-128`.

    Raises:
      ValueError: naming what is known.
    """
    found = re.fullmatch(r"(v\w+?)(?::(\d+(?:x\d+)+)|-(\d+))", text)
    if not found or found[1].replace("litepod", "e") not in CHIPS:
        known = ", ".join(CHIPS)
        raise ValueError(f"topology {text!r} is neither like v5e:8x8 nor like v5p-128, of {known}")
    chip = CHIPS[found[1].replace("litepod", "e")]
    if found[2]:
        grid = tuple(map(int, found[2].split("x")))
        if len(grid) != chip.dims:
            raise ValueError(f"topology {text!r}: {chip.name} has {chip.dims} dimensions")
        return Topology(chip, grid)
    chips, rest = divmod(int(found[3]), chip.cores)
    if rest or chips & (chips - 1) or not chips:
        raise ValueError(f"topology {text!r}: the number of chips is no power of two; give the grid")
    return Topology(chip, _grid(chips, chip.dims))


def _grid(chips: int, dims: int) -> tuple[int, ...]:
    """The most compact grid, smallest dimension first: 16 chips are 4x4 or 2x2x4."""
    power = chips.bit_length() - 1
    return tuple(2 ** ((power + dim) // dims) for dim in range(dims))


def _prepare_libtpu() -> None:
    """Lets `libtpu` start where there is no TPU. Has no effect on what it compiles."""
    quiet: dict[str, Any] = {
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-1",
        "TPU_MIN_LOG_LEVEL": "3",
    }
    for name, value in quiet.items():
        os.environ.setdefault(name, value)
