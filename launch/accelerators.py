"""The TPU slices there are: how gcloud, GKE and SkyPilot call them, and what each consists of."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Generation:
    """What all slices of a TPU generation share.

    Attributes:
      gcloud: prefix of `--accelerator-type`.
      gke: value of the node label `cloud.google.com/gke-tpu-accelerator`.
      runtime_version: the TPU VM image for JAX.
      chips_per_host: on slices of several hosts.
      chips_per_unit: the number in a slice's name counts cores, two a chip, up to v5p; chips since.
      topologies: of every slice, by the number in its name.
    """

    gcloud: str
    gke: str
    runtime_version: str
    chips_per_host: int
    chips_per_unit: float
    topologies: dict[int, str]


_TWO_DIMENSIONS = {
    1: "1x1",
    4: "2x2",
    8: "2x4",
    16: "4x4",
    32: "4x8",
    64: "8x8",
    128: "8x16",
    256: "16x16",
}
_THREE_DIMENSIONS = {
    8: "2x2x1",
    16: "2x2x2",
    32: "2x2x4",
    64: "2x4x4",
    128: "4x4x4",
    256: "4x4x8",
    512: "4x8x8",
    1024: "8x8x8",
    2048: "8x8x16",
    4096: "8x16x16",
}

# cloud.google.com/tpu/docs: the pages of each generation, and "TPU software versions". Larger v5p
# slices exist in more shapes than these.
GENERATIONS = {
    "v4": Generation("v4", "tpu-v4-podslice", "tpu-ubuntu2204-base", 4, 0.5, _THREE_DIMENSIONS),
    "v5e": Generation("v5litepod", "tpu-v5-lite-podslice", "v2-alpha-tpuv5-lite", 4, 1.0, _TWO_DIMENSIONS),
    "v5p": Generation(
        "v5p",
        "tpu-v5p-slice",
        "v2-alpha-tpuv5",
        4,
        0.5,
        _THREE_DIMENSIONS | {384: "4x4x12", 768: "4x8x12", 1536: "8x8x12", 8192: "16x16x16"},
    ),
    "v6e": Generation("v6e", "tpu-v6e-slice", "v2-alpha-tpuv6e", 4, 1.0, _TWO_DIMENSIONS),
}


@dataclasses.dataclass(frozen=True)
class Slice:
    """One slice, such as v5e-64.

    Attributes:
      name: generation and size, as everybody says it.
      generation: see `Generation`.
      topology: chips along each axis, such as "8x8".
      chips: how many.
      hosts: virtual machines, and so processes of JAX.
    """

    name: str
    generation: Generation
    topology: str
    chips: int
    hosts: int

    @property
    def accelerator_type(self) -> str:
        """What gcloud, xpk and (with "tpu-" before it) SkyPilot call it."""
        return f"{self.generation.gcloud}-{self.name.partition('-')[2]}"

    @property
    def chips_per_host(self) -> int:
        """Also what a GKE pod asks for as `google.com/tpu`."""
        return self.chips // self.hosts


def find(name: str) -> Slice:
    """The slice of that name: v4-32, v5e-64, v5p-128, v6e-256; 8 in `v4-8` counts cores.

    Raises:
      ValueError: no such generation or size; the message names the nearest there are.
    """
    kind, _, size = name.partition("-")
    # What gcloud's own listing says is meant as well.
    kind = {generation.gcloud: known for known, generation in GENERATIONS.items()}.get(kind, kind)
    generation = GENERATIONS.get(kind)
    if generation is None or not size.isdecimal():
        raise ValueError(f"no TPU slice {name!r}: say one of {', '.join(GENERATIONS)}, and a size, as v5e-64")
    units = int(size)
    if units not in generation.topologies:
        raise ValueError(f"no TPU slice {name!r}; {_nearest(kind, units)}")
    chips = round(units * generation.chips_per_unit)
    # v5e and v6e have hosts of eight chips, which are slices of their own.
    hosts = 1 if chips <= 8 and generation.chips_per_unit == 1 else chips // generation.chips_per_host
    return Slice(f"{kind}-{units}", generation, generation.topologies[units], chips, hosts)


def _nearest(kind: str, units: int) -> str:
    sizes = sorted(GENERATIONS[kind].topologies)
    below = [size for size in sizes if size < units][-1:]
    above = [size for size in sizes if size > units][:1]
    return "the nearest are " + " and ".join(f"{kind}-{size}" for size in below + above)
