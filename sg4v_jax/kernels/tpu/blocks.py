"""Block sizes per generation of TPU, by the cycles that `benchmarks/kernels.py tune` counts.

Those of `decode`, `causal` and `packed` are what it chose on every generation, but for `causal` backward
on v5e and v5p: blocks of 1024 keys are 0.2 % faster there and compile half as long again. Those of `vit`
are the best of sweeps by hand on v5e, v6e and v4, v5p's are v5e's; where more heads are faster but compile
for long (backward on v6e) or slow other shapes down (forward on v6e), the table has fewer.
"""

import dataclasses

from sg4v_jax.kernels.tpu.flash_plan import Blocks


@dataclasses.dataclass(frozen=True)
class Choice:
    """What was best on one generation.

    Attributes:
      causal: forward and backward blocks of the decoder without segments.
      packed: the same with segments: smaller blocks of keys skip more.
      vit: heads per program of 640 tokens and rows per tile of the vision tower, (forward, backward) each.
      decode: rows of the cache per block.
      decode_int8: the same of an int8 cache.
    """

    causal: tuple[Blocks, Blocks]
    packed: tuple[Blocks, Blocks]
    vit: tuple[int, int, int, int]
    decode: int
    decode_int8: int


CHOICES: dict[str, Choice] = {
    "v4": Choice(
        causal=(Blocks(1024, 512, 256, 2), Blocks(512, 512, 256, 2)),
        packed=(Blocks(512, 256, 256, 2), Blocks(512, 256, 256, 2)),
        vit=(4, 2, 320, 384),
        decode=2048,
        decode_int8=16384,
    ),
    "v5e": Choice(
        causal=(Blocks(1024, 512, 256, 2), Blocks(1024, 512, 256, 2)),
        packed=(Blocks(512, 256, 256, 4), Blocks(512, 256, 256, 4)),
        vit=(8, 4, 640, 640),
        decode=2048,
        decode_int8=8192,
    ),
    "v5p": Choice(
        causal=(Blocks(1024, 512, 256, 2), Blocks(1024, 512, 256, 2)),
        packed=(Blocks(512, 256, 256, 4), Blocks(512, 256, 256, 2)),
        vit=(8, 4, 640, 640),
        decode=4096,
        decode_int8=16384,
    ),
    "v6e": Choice(
        causal=(Blocks(1024, 1024, 256, 2), Blocks(1024, 1024, 256, 2)),
        packed=(Blocks(512, 256, 256, 4), Blocks(512, 256, 256, 4)),
        vit=(4, 4, 640, 384),
        decode=8192,
        decode_int8=16384,
    ),
}


def choice(generation: str) -> Choice:
    """The blocks of a generation; those of v4 fit anything that is not in the table."""
    return CHOICES.get(generation, CHOICES["v4"])
