"""Names and layouts of checkpoints, as data.

Every parameter has one row: where it is in our parameters, its canonical key in a checkpoint and
how the two arrays relate. The canonical keys are those of the files on the Hugging Face Hub
(layout A of spec 5.2). Other layouts differ in prefixes only and are reached by renaming rules.

Another encoder or decoder is one more table, and a line in `table`.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Iterator

import numpy as np

from sg4v_jax.convert.tensors import contiguous
from sg4v_jax.models.config import ModelConfig
from sg4v_jax.models.projector import projector_depth

# How an array in a file relates to ours: axis j of the file's is our axes LAYOUTS[layout][j], flattened.
# Ours are kernel[*in, *out], so heads come first on one side and last on the other.
LAYOUTS: dict[str, tuple[tuple[int, ...], ...]] = {
    "vector": ((0,),),
    "table": ((0,), (1,)),
    "linear": ((1,), (0,)),  # [out, in] <-> [in, out]
    "linear_to_heads": ((1, 2), (0,)),  # [heads * head_dim, in] <-> [in, heads, head_dim]
    "linear_from_heads": ((2,), (0, 1)),  # [out, heads * head_dim] <-> [heads, head_dim, out]
    "bias_to_heads": ((0, 1),),  # [heads * head_dim] <-> [heads, head_dim]
    "conv": ((3,), (2,), (0,), (1,)),  # [out, in, height, width] <-> [height, width, in, out]
}


def file_shape(layout: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape in a file of an array that has `shape` in ours."""
    return tuple(math.prod(shape[axis] for axis in group) for group in LAYOUTS[layout])


def to_file(layout: str, array: np.ndarray) -> np.ndarray:
    """One of our arrays (of one layer) as a file has it, in C order."""
    if layout.startswith("linear"):
        rows, columns = file_shape(layout, array.shape)
        return contiguous(array.reshape(columns, rows).T)
    order = list(itertools.chain(*LAYOUTS[layout]))
    return contiguous(array.transpose(order)).reshape(file_shape(layout, array.shape))


def from_file(layout: str, array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The inverse of `to_file`: a file's array with our `shape`, in C order."""
    if layout.startswith("linear"):
        return contiguous(array.T).reshape(shape)
    order = list(itertools.chain(*LAYOUTS[layout]))
    return contiguous(array.reshape([shape[axis] for axis in order]).transpose(np.argsort(order)))


@dataclasses.dataclass(frozen=True)
class Row:
    """One parameter, or one parameter of every block.

    Attributes:
      path: where it is in our parameters; `{stack}` stands for the stack its block is in.
      key: its canonical key; `{i}` stands for the block.
      layout: a key of `LAYOUTS`.
      padded: whether its rows are the vocabulary, to which files may add unused ones.
    """

    path: str
    key: str
    layout: str
    padded: bool = False


CLIP = (
    *(
        Row(f"vision/{path}", f"vision_tower.vision_model.{key}", layout)
        for path, key, layout in (
            ("patch_embedding/kernel", "embeddings.patch_embedding.weight", "conv"),
            ("class_embedding", "embeddings.class_embedding", "vector"),
            ("position_embedding", "embeddings.position_embedding.weight", "table"),
            ("pre_norm/scale", "pre_layrnorm.weight", "vector"),  # the spelling is CLIP's
            ("pre_norm/bias", "pre_layrnorm.bias", "vector"),
            ("post_norm/scale", "post_layernorm.weight", "vector"),
            ("post_norm/bias", "post_layernorm.bias", "vector"),
        )
    ),
    *(
        Row(f"vision/{{stack}}/{path}", f"vision_tower.vision_model.encoder.layers.{{i}}.{key}", layout)
        for path, key, layout in (
            ("attention_norm/scale", "layer_norm1.weight", "vector"),
            ("attention_norm/bias", "layer_norm1.bias", "vector"),
            ("attention/query/kernel", "self_attn.q_proj.weight", "linear_to_heads"),
            ("attention/query/bias", "self_attn.q_proj.bias", "bias_to_heads"),
            ("attention/key/kernel", "self_attn.k_proj.weight", "linear_to_heads"),
            ("attention/key/bias", "self_attn.k_proj.bias", "bias_to_heads"),
            ("attention/value/kernel", "self_attn.v_proj.weight", "linear_to_heads"),
            ("attention/value/bias", "self_attn.v_proj.bias", "bias_to_heads"),
            ("attention/out/kernel", "self_attn.out_proj.weight", "linear_from_heads"),
            ("attention/out/bias", "self_attn.out_proj.bias", "vector"),
            ("mlp_norm/scale", "layer_norm2.weight", "vector"),
            ("mlp_norm/bias", "layer_norm2.bias", "vector"),
            ("mlp/up/kernel", "mlp.fc1.weight", "linear"),
            ("mlp/up/bias", "mlp.fc1.bias", "vector"),
            ("mlp/down/kernel", "mlp.fc2.weight", "linear"),
            ("mlp/down/bias", "mlp.fc2.bias", "vector"),
        )
    ),
)

# HF's LLaMA weights already pair the first with the second half of a head, as `models.llama.rotate`.
LLAMA = (
    Row("text/embedding", "language_model.model.embed_tokens.weight", "table", padded=True),
    Row("text/norm/scale", "language_model.model.norm.weight", "vector"),
    Row("text/head/kernel", "language_model.lm_head.weight", "linear", padded=True),
    *(
        Row(f"text/{{stack}}/{path}", f"language_model.model.layers.{{i}}.{key}", layout)
        for path, key, layout in (
            ("attention_norm/scale", "input_layernorm.weight", "vector"),
            ("attention/query/kernel", "self_attn.q_proj.weight", "linear_to_heads"),
            ("attention/key/kernel", "self_attn.k_proj.weight", "linear_to_heads"),
            ("attention/value/kernel", "self_attn.v_proj.weight", "linear_to_heads"),
            ("attention/out/kernel", "self_attn.o_proj.weight", "linear_from_heads"),
            ("mlp_norm/scale", "post_attention_layernorm.weight", "vector"),
            ("mlp/gate/kernel", "mlp.gate_proj.weight", "linear"),
            ("mlp/up/kernel", "mlp.up_proj.weight", "linear"),
            ("mlp/down/kernel", "mlp.down_proj.weight", "linear"),
        )
    ),
)


def projector_table(kind: str) -> tuple[Row, ...]:
    """Rows of the projector, which counts its layers from 0 in our names and from 1 in HF's."""
    rows = []
    for i in range(projector_depth(kind)):
        key = f"multi_modal_projector.linear_{i + 1}"
        rows.append(Row(f"projector/layer_{i}/kernel", f"{key}.weight", "linear"))
        rows.append(Row(f"projector/layer_{i}/bias", f"{key}.bias", "vector"))
    return tuple(rows)


def table(config: ModelConfig) -> tuple[Row, ...]:
    """Every row of a model."""
    return CLIP + projector_table(config.projector) + LLAMA


def stacks(config: ModelConfig) -> dict[str, dict[str, range]]:
    """Which blocks of a tower each of its stacks holds (see `models.vit`); none is empty."""
    vision, used = config.vision, config.vision.num_used_layers
    towers = {
        "vision": {
            "frozen": range(vision.tuned_from),
            "tuned": range(vision.tuned_from, used),
            "unused": range(used, vision.num_layers),
        },
        "text": {"blocks": range(config.text.num_layers)},
    }
    return {
        tower: {stack: blocks for stack, blocks in parts.items() if blocks} for tower, parts in towers.items()
    }


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor of a checkpoint.

    Attributes:
      path: the parameter it belongs to, as keys into the nested dict.
      layer: which layer of that (stacked) parameter it is, or None.
      key: its canonical key.
      row: the row it comes from.
    """

    path: tuple[str, ...]
    layer: int | None
    key: str
    row: Row


def entries(config: ModelConfig) -> Iterator[Entry]:
    """Every tensor of a complete checkpoint; those of one parameter follow each other."""
    towers = stacks(config)
    for row in table(config):
        if "{i}" not in row.key:
            yield Entry(tuple(row.path.split("/")), None, row.key, row)
            continue
        for stack, blocks in towers[row.path.split("/")[0]].items():
            path = tuple(row.path.format(stack=stack).split("/"))
            for layer, block in enumerate(blocks):
                yield Entry(path, layer, row.key.format(i=block), row)


MAX_PROJECTOR_DEPTH = 9

# Not parameters of this model: rotary tables and position ids that old versions stored, the row
# separator of other LLaVAs, and the text half of a CLIP checkpoint.
DROPPED = (
    r"(^|\.)rotary_emb\.inv_freq$",
    r"(^|\.)position_ids$",
    r"(^|\.)image_newline$",
    r"^text_model\.",
    r"^(text_projection|visual_projection)\.",
    r"^logit_scale$",
)

# Applied in order, each once.
TO_CANONICAL = (
    # LLaVA and share4v: the projector is an nn.Sequential with an activation at every odd place ...
    *(
        (rf"^(model\.)?mm_projector\.{2 * i}\.", f"multi_modal_projector.linear_{i + 1}.")
        for i in range(MAX_PROJECTOR_DEPTH)
    ),
    # ... or, of the kind `linear`, one bare layer.
    (r"^(model\.)?mm_projector\.(?=weight|bias)", "multi_modal_projector.linear_1."),
    # transformers 4.52 and newer keep everything but the head in `model` (layout B).
    (r"^model\.(?=language_model\.|vision_tower\.|multi_modal_projector\.)", ""),
    # LLaVA wraps the tower once more.
    (r"^vision_tower\.vision_tower\.", "vision_tower."),
    # A tower's own directory; transformers 5 has no level `vision_model`.
    (r"^vision_model\.", "vision_tower.vision_model."),
    (
        r"^(vision_tower\.)?(?=embeddings\.|pre_layrnorm\.|encoder\.|post_layernorm\.)",
        "vision_tower.vision_model.",
    ),
    # LLaVA, share4v and plain LLaMA: `model.layers`; layout B: `language_model.layers`.
    (r"^(language_model|model)\.(?=embed_tokens\.|layers\.|norm\.)", "language_model.model."),
    (r"^lm_head\.", "language_model.lm_head."),
)

FROM_CANONICAL_SHARE4V = (
    (r"^language_model\.(?=model\.|lm_head\.)", ""),
    *(
        (rf"^multi_modal_projector\.linear_{i + 1}\.", f"model.mm_projector.{2 * i}.")
        for i in range(MAX_PROJECTOR_DEPTH)
    ),
    (r"^vision_tower\.", ""),
)


def canonical_name(name: str) -> str | None:
    """The canonical key of a tensor in any of the layouts of spec 5, or None if it is no parameter."""
    if any(re.search(pattern, name) for pattern in DROPPED):
        return None
    return _rename(name, TO_CANONICAL)


def share4v_name(key: str, projector: str) -> str:
    """The name share4v stores a tensor under; towers' names start with `vision_model.`.

    Args:
      key: the canonical key.
      projector: kind of the projector; `linear` alone is not a sequence of layers.
    """
    name = _rename(key, FROM_CANONICAL_SHARE4V)
    return name.replace("mm_projector.0.", "mm_projector.") if projector == "linear" else name


def _rename(name: str, rules: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name, count=1)
    return name
