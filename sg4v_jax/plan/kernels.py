"""Seconds that the attention kernels take, from the cycles of their schedules, counted once.

`benchmarks/kernels.py` counts them.
"""

import dataclasses

from sg4v_jax.models.config import ModelConfig
from sg4v_jax.plan.topology import CHIPS

_NAMES = ("flash_forward", "flash_backward", "vit_forward", "vit_backward", "decode")
# Of the chip's peak, or of its memory's bandwidth for `decode`: rows of two samples of 1024 positions,
# images of 577, caches of 2048. v5e was counted at these shapes; the others are scaled from it by the table
# of docs/kernels.md.
SHARES = {
    "v4": dict(zip(_NAMES, (0.31, 0.29, 0.26, 0.36, 0.99), strict=True)),
    "v5e": dict(zip(_NAMES, (0.48, 0.58, 0.38, 0.39, 0.98), strict=True)),
    "v5p": dict(zip(_NAMES, (0.48, 0.42, 0.40, 0.40, 0.99), strict=True)),
    "v6e": dict(zip(_NAMES, (0.18, 0.25, 0.13, 0.16, 0.99), strict=True)),
}


@dataclasses.dataclass(frozen=True)
class Shapes:
    """What a step's attention works on.

    Attributes:
      model: whose heads they are.
      generation: of TPU.
      length: positions of a row; 0 without the decoder's and the tower's kernels.
      samples: in a row, of equal length; they don't see each other.
      context: positions in a slot's cache; 0 without decoding.
      int8: whether these are int8, with a float32 scale for each head.
    """

    model: ModelConfig
    generation: str
    length: int = 0
    samples: int = 1
    context: int = 0
    int8: bool = False


def seconds(shapes: Shapes) -> dict[str, float]:
    """Seconds of one row, image or slot in one layer, by the kernel's name, all heads on one chip."""
    chip, share = CHIPS[shapes.generation], SHARES[shapes.generation]
    tower, text = shapes.model.vision, shapes.model.text
    tokens = tower.num_patches + 1 if shapes.length else 0
    row = 4 * (shapes.length**2 / shapes.samples / 2) * text.num_heads * text.head_dim / chip.flops
    image = 4 * tokens**2 * tower.hidden_size / chip.flops
    head = text.head_dim + 4 if shapes.int8 else 2 * text.head_dim
    # The backward kernels compute five products for the forward ones' two.
    work = {
        "flash_forward": row,
        "flash_backward": 2.5 * row,
        "vit_forward": image,
        "vit_backward": 2.5 * image,
        "decode": 2 * shapes.context * text.num_kv_heads * head / chip.hbm_bandwidth,
    }
    return {name: seconds / share[name] for name, seconds in work.items() if seconds}
