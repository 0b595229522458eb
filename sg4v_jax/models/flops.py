"""Model FLOPs: what a step must compute by the model's own definition, whatever the program does.

Counted are the matrix products, a multiply-add as two, of everything that isn't padding. Attention counts
the keys a query may see. What is computed again (remat, the chunked loss) does not count, nor does work on
padding and on empty image slots: it lowers the utilisation, as it should.
"""

import dataclasses
from collections.abc import Collection, Iterator
from typing import Any

import jax

from sg4v_jax.models.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class ModelFlops:
    """FLOPs of a model's parts; those of a step are linear in what its batch holds.

    Attributes:
      per_image: of the vision tower and the projector, for one image.
      per_token: of the decoder's products with weights, for one position (text or image feature).
      per_pair: of the decoder's attention, for one query and one key that it sees.
    """

    per_image: int
    per_token: int
    per_pair: int

    def of(self, images: int, tokens: int, pairs: int) -> int:
        """FLOPs for so many images, positions, and pairs of a query and a key.

        Causal attention within a sample of n positions has n (n + 1) / 2 pairs.
        """
        return self.per_image * images + self.per_token * tokens + self.per_pair * pairs


def model_flops(config: ModelConfig, shapes: dict[str, Any], trained: Collection[str]) -> ModelFlops:
    """FLOPs of a forward pass, and of the backward pass as far as there is one.

    A trained kernel costs its product once more, for its gradient; and once more again where a gradient
    has to go through it, to a parameter below that trains. Frozen blocks at the bottom have neither.

    Args:
      config: the model's shapes.
      shapes: its parameters; see `sharegpt4v.abstract_model`.
      trained: paths of those that train, as in `text/blocks/mlp/up/kernel`; none is a forward pass alone.
    """
    vision, text = config.vision, config.text
    patches, features = vision.num_patches, vision.num_image_tokens
    # In the order of the forward pass: the part, how often its kernels are used, and whether it is a stack.
    parts = [
        ("vision/patch_embedding", patches, False),
        ("vision/class_embedding", 0, False),
        ("vision/position_embedding", 0, False),
        ("vision/pre_norm", 0, False),
        ("vision/frozen", patches + 1, True),
        ("vision/tuned", patches + 1, True),
        *((f"projector/layer_{i}", features, False) for i in range(len(shapes["projector"]))),
        ("text/embedding", 0, False),
        ("text/blocks", 1, True),
        ("text/norm", 0, False),
        ("text/head", 1, False),
    ]
    flops = {"vision": 0, "projector": 0, "text": 0}
    leaves = dict(_paths(shapes))
    passes = {}
    below = False
    for part, uses, is_stack in parts:
        inside = [path for path in leaves if path == part or path.startswith(part + "/")]
        trains = any(path in trained for path in inside)
        # Within a stack gradients go through every block but the first one's input.
        through = below or (is_stack and trains)
        passes[part] = 3 if through else 1
        for path in inside:
            if path.endswith("/kernel"):
                products = 1 + (path in trained) + through
                flops[path.split("/")[0]] += 2 * leaves[path].size * uses * products
        below = below or trains
    # A query and a key meet twice: in their score, and where the value is added.
    per_pair = 4 * vision.hidden_size * (patches + 1) ** 2
    stacks = {
        "vision/frozen": vision.tuned_from,
        "vision/tuned": vision.num_used_layers - vision.tuned_from,
    }
    attention = sum(per_pair * layers * passes[name] for name, layers in stacks.items())
    return ModelFlops(
        per_image=flops["vision"] + flops["projector"] + attention,
        per_token=flops["text"],
        per_pair=4 * text.num_heads * text.head_dim * text.num_layers * passes["text/blocks"],
    )


def _paths(tree: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for keys, leaf in jax.tree.leaves_with_path(tree):
        yield "/".join(key.key for key in keys), leaf
