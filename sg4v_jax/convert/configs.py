"""config.json of a decoder and of a vision tower, to our configs and back.

Files leave out what equals their class's default in transformers, so the tables name it.
"""

from collections.abc import Mapping
from typing import Any, TypeVar

from sg4v_jax.convert.tensors import ConversionError
from sg4v_jax.models.config import TextConfig, VisionConfig

_Config = TypeVar("_Config", TextConfig, VisionConfig)

# (our field, key in the file, LlamaConfig's default). None: depends on the others.
_LLAMA = (
    ("vocab_size", "vocab_size", 32000),
    ("hidden_size", "hidden_size", 4096),
    ("intermediate_size", "intermediate_size", 11008),
    ("num_layers", "num_hidden_layers", 32),
    ("num_heads", "num_attention_heads", 32),
    ("num_kv_heads", "num_key_value_heads", None),
    ("head_dim", "head_dim", None),
    ("norm_eps", "rms_norm_eps", 1e-6),
    ("max_positions", "max_position_embeddings", 2048),
)

# (our field, key in the file, CLIPVisionConfig's default).
_CLIP = (
    ("hidden_size", "hidden_size", 768),
    ("intermediate_size", "intermediate_size", 3072),
    ("num_layers", "num_hidden_layers", 12),
    ("num_heads", "num_attention_heads", 12),
    ("image_size", "image_size", 224),
    ("patch_size", "patch_size", 32),
    ("norm_eps", "layer_norm_eps", 1e-5),
)

# What the model here can't vary. Loading anything else would give wrong answers without a word.
_LLAMA_FIXED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
}
_CLIP_FIXED = {"model_type": "clip_vision_model", "hidden_act": "quick_gelu", "num_channels": 3}


def read_text(fields: Mapping[str, Any], *, model_types: tuple[str, ...] = ("llama",)) -> TextConfig:
    """The decoder that a LLaMA config describes.

    Args:
      fields: the config's keys; missing ones take LlamaConfig's defaults.
      model_types: those accepted.

    Raises:
      ConversionError: with everything that the model here can't be.
    """
    problems = unsupported(fields, _LLAMA_FIXED)
    if fields.get("model_type", model_types[0]) not in model_types:
        problems.append(f"model_type is {fields['model_type']!r}; supported: {', '.join(model_types)}")
    # transformers 5 keeps the base of the rotary embedding with the kind of its scaling.
    rope = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        problems.append(f"rotary embedding of type {kind!r}; supported: 'default'")
    theta = rope.get("rope_theta", fields.get("rope_theta", 10000.0))
    values = _read(fields, _LLAMA)
    values["num_kv_heads"] = values["num_kv_heads"] or values["num_heads"]
    values["head_dim"] = values["head_dim"] or 0
    return _construct(TextConfig, {**values, "rope_theta": float(theta)}, problems)


def write_text(config: TextConfig) -> dict[str, Any]:
    """The inverse of `read_text`, readable by transformers 4 and 5."""
    fields = {key: getattr(config, ours) for ours, key, _ in _LLAMA}
    return {**fields, **_LLAMA_FIXED, "model_type": "llama", "rope_theta": config.rope_theta}


def read_vision(fields: Mapping[str, Any]) -> VisionConfig:
    """The tower that a CLIP vision config describes.

    Args:
      fields: the config's keys; missing ones take CLIPVisionConfig's defaults. The config of a
        whole CLIP, with its `vision_config`, will do.

    Raises:
      ConversionError: with everything that the model here can't be.
    """
    if fields.get("model_type") == "clip":
        fields = fields.get("vision_config") or {}
    return _construct(VisionConfig, _read(fields, _CLIP), unsupported(fields, _CLIP_FIXED))


def write_vision(config: VisionConfig) -> dict[str, Any]:
    """The inverse of `read_vision`."""
    # Only a whole CLIP uses the projection; this is the size ViT-L has.
    return {**{key: getattr(config, ours) for ours, key, _ in _CLIP}, **_CLIP_FIXED, "projection_dim": 768}


def unsupported(fields: Mapping[str, Any], fixed: Mapping[str, Any]) -> list[str]:
    """A line for each field that has another value than the one that is supported."""
    return [
        f"{key} is {fields[key]!r}; supported: {value!r}"
        for key, value in fixed.items()
        if fields.get(key, value) != value
    ]


def _read(fields: Mapping[str, Any], table: tuple[tuple[str, str, Any], ...]) -> dict[str, Any]:
    return {ours: fields.get(key, default) for ours, key, default in table}


def _construct(cls: type[_Config], values: Mapping[str, Any], problems: list[str]) -> _Config:
    try:
        config = cls(**values)
    except (TypeError, ValueError) as error:
        problems = [*problems, str(error)]
    if problems:
        raise ConversionError([f"config.json: {problem}" for problem in problems])
    return config
