"""Shapes of the model, free of JAX so that data workers can import them cheaply."""

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

# Statistics of CLIP's training images; `preprocessor_config.json` of every CLIP and LLaVA checkpoint.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

SELECT_FEATURES = ("patch", "cls_patch")


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """CLIP vision transformer. The defaults are ViT-L/14-336.

    Attributes:
      hidden_size: width of the residual stream.
      intermediate_size: width of the MLP.
      num_layers: blocks in the checkpoint, including those above `select_layer`.
      num_heads: attention heads; `hidden_size` must divide by it.
      image_size: side of the square input in pixels.
      patch_size: side of a patch in pixels.
      norm_eps: epsilon of the layer norms.
      select_layer: which hidden state becomes the image features, as an index into
        [after pre-norm, after block 0, ..., after the last block]; LLaVA takes -2.
      select_feature: `patch` drops the class token, `cls_patch` keeps it.
      tuned_from: first block that training updates. Blocks below it live in their own stack
        (`frozen`), so that no gradient, optimizer state or activation is kept for them.
    """

    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_layers: int = 24
    num_heads: int = 16
    image_size: int = 336
    patch_size: int = 14
    norm_eps: float = 1e-5
    select_layer: int = -2
    select_feature: str = "patch"
    tuned_from: int = 0

    def __post_init__(self) -> None:
        _divides("hidden_size", self.hidden_size, "num_heads", self.num_heads)
        if self.image_size < self.patch_size:
            raise ValueError(f"image_size {self.image_size} is smaller than patch_size {self.patch_size}")
        if self.select_feature not in SELECT_FEATURES:
            raise ValueError(f"select_feature {self.select_feature!r} is not one of {SELECT_FEATURES}")
        if not 0 <= self.num_used_layers <= self.num_layers:
            raise ValueError(f"select_layer {self.select_layer} lies outside {self.num_layers} layers")
        if not 0 <= self.tuned_from <= self.num_used_layers:
            raise ValueError(
                f"tuned_from {self.tuned_from} must lie in 0..{self.num_used_layers} "
                f"(layers above select_layer {self.select_layer} are never computed)"
            )

    @property
    def num_used_layers(self) -> int:
        """Blocks that are computed; those above feed nothing."""
        return self.select_layer if self.select_layer >= 0 else self.num_layers + 1 + self.select_layer

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @property
    def num_image_tokens(self) -> int:
        """Features one image contributes to the text sequence."""
        return self.num_patches + (self.select_feature == "cls_patch")


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """LLaMA decoder. The defaults are Vicuna-7B-v1.5.

    Attributes:
      vocab_size: rows of the embedding and columns of the head.
      hidden_size: width of the residual stream.
      intermediate_size: width of the SwiGLU MLP.
      num_layers: decoder blocks.
      num_heads: query heads.
      num_kv_heads: key/value heads; fewer than `num_heads` is grouped-query attention.
      head_dim: width of one head; 0 means `hidden_size // num_heads`.
      norm_eps: epsilon of the RMS norms.
      rope_theta: base of the rotary embedding.
      max_positions: longest sequence the checkpoint was made for.
    """

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_layers: int = 32
    num_heads: int = 32
    num_kv_heads: int = 32
    head_dim: int = 0
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    max_positions: int = 4096

    def __post_init__(self) -> None:
        if not self.head_dim:
            _divides("hidden_size", self.hidden_size, "num_heads", self.num_heads)
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_heads)
        _divides("num_heads", self.num_heads, "num_kv_heads", self.num_kv_heads)
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} must be even: rotary embedding pairs its halves")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """ShareGPT4V: vision tower, projector and decoder.

    Attributes:
      vision: the vision tower.
      text: the decoder.
      projector: `mlp2x_gelu` in LLaVA-1.5 and ShareGPT4V; `linear` and `mlpNx_gelu` also exist.
    """

    vision: VisionConfig = dataclasses.field(default_factory=VisionConfig)
    text: TextConfig = dataclasses.field(default_factory=TextConfig)
    projector: str = "mlp2x_gelu"

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "ModelConfig":
        """Inverse of `dataclasses.asdict`. An unknown key raises and names the nearest known one."""
        fields = dict(fields)
        vision = _construct(VisionConfig, fields.pop("vision", {}), "model.vision")
        text = _construct(TextConfig, fields.pop("text", {}), "model.text")
        return _construct(cls, {"vision": vision, "text": text, **fields}, "model")

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def with_tuned_from(self, block: int) -> "ModelConfig":
        """The same model with the vision tower split before `block`."""
        return dataclasses.replace(self, vision=dataclasses.replace(self.vision, tuned_from=block))


def _construct(cls: Any, fields: Mapping[str, Any], where: str) -> Any:
    known = [field.name for field in dataclasses.fields(cls)]
    for key in fields:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}"
            raise ValueError(f"unknown field {where}.{key}{hint}")
    return cls(**fields)


def _divides(name: str, value: int, by_name: str, by: int) -> None:
    if by <= 0 or value % by:
        raise ValueError(f"{name} {value} does not divide by {by_name} {by}")
