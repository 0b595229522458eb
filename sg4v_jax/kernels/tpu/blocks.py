"""Block sizes per generation of TPU.

Those of v5e and v6e are the best of sweeps by hand over cycle counts; v4 and v5p are by analogy, not swept.
`benchmarks/kernels.py tune` counts the alternatives.
"""

import dataclasses

from sg4v_jax.kernels.tpu.flash_plan import Blocks


@dataclasses.dataclass(frozen=True)
class Choice:
    """What was best on one generation.

    Attributes:
      causal: forward and backward blocks of the decoder without segments.
      packed: the same with segments: smaller blocks of keys skip more.
      vit: heads per program (forward, backward) and rows per tile of the vision tower.
      decode: rows of the cache per block.
    """

    causal: tuple[Blocks, Blocks]
    packed: tuple[Blocks, Blocks]
    vit: tuple[int, int, int]
    decode: int


CHOICES: dict[str, Choice] = {
    "v4": Choice(
        causal=(Blocks(512, 512, 256, 2), Blocks(512, 256, 256, 1)),
        packed=(Blocks(512, 256, 256, 2), Blocks(512, 256, 256, 1)),
        vit=(4, 2, 320),
        decode=4096,
    ),
    "v5e": Choice(
        causal=(Blocks(512, 512, 256, 4), Blocks(1024, 512, 256, 2)),
        packed=(Blocks(512, 256, 256, 4), Blocks(512, 256, 256, 4)),
        vit=(8, 4, 640),
        decode=4096,
    ),
    "v5p": Choice(
        causal=(Blocks(512, 512, 256, 4), Blocks(1024, 512, 256, 2)),
        packed=(Blocks(512, 256, 256, 4), Blocks(512, 256, 256, 4)),
        vit=(8, 4, 640),
        decode=4096,
    ),
    "v6e": Choice(
        causal=(Blocks(1024, 1024, 256, 2), Blocks(1024, 512, 256, 2)),
        packed=(Blocks(512, 256, 256, 4), Blocks(512, 256, 256, 4)),
        vit=(4, 4, 640),
        decode=8192,
    ),
}


def choice(generation: str) -> Choice:
    """The blocks of a generation; those of v4 fit anything that is not in the table."""
    return CHOICES.get(generation, CHOICES["v4"])
