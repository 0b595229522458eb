"""The original format of ShareGPT4V: decoder and projector, with the vision tower apart (spec 5.1).

LLaVA-1.5's official checkpoints are the same with the tower inside, and the directories that
training starts from are parts of it: a LLaMA, a CLIP, a projector alone.
"""

import dataclasses
import math
import pathlib
from collections.abc import Mapping
from typing import Any

from sg4v_jax.convert import companions, configs
from sg4v_jax.convert.checkpoint import PARTS, Checkpoint, Usage
from sg4v_jax.convert.files import (
    MAX_SHARD_BYTES,
    Stream,
    has_weights,
    open_file,
    open_tensors,
    read_json,
    write_json,
    write_tensors,
)
from sg4v_jax.convert.names import entries, share4v_name
from sg4v_jax.convert.params import by_canonical_name
from sg4v_jax.convert.tensors import ConversionError, Tensor
from sg4v_jax.data.image import ASPECTS
from sg4v_jax.models.config import ModelConfig, VisionConfig

_TOWER = "vision_tower"
_CLIP_HEAD_DIM = 64
# LLaVA differs in the name only, and Vicuna, to start from, in having no projector yet.
_MODEL_TYPES = ("share4v", "llava", "llama")
# What LLaVA's pre-training leaves beside a config.json, without the decoder.
PROJECTOR_FILE = "mm_projector.bin"


def open_share4v(directory: pathlib.Path, *, with_tower: bool = True) -> Checkpoint:
    """Opens a checkpoint in the original format of ShareGPT4V or LLaVA-1.5, or a LLaMA.

    The tower is the one inside, or else that which `mm_vision_tower` names, relative to
    `directory`, or its sub-directory `vision_tower`; where none is found the part is missing.

    Args:
      directory: a local one.
      with_tower: whether to open the tower, wherever it is.

    Raises:
      ConversionError: files are missing or damaged, or a config asks for what the model here
        can't do. Lists everything that is wrong.
    """
    fields = read_json(directory / "config.json")
    if not has_weights(directory) and (directory / PROJECTOR_FILE).is_file():
        return open_projector(directory / PROJECTOR_FILE)
    tensors = by_canonical_name(open_tensors(directory))
    has_projector = any(key.startswith(PARTS["projector"]) for key in tensors)
    inside = {key: tensor for key, tensor in tensors.items() if key.startswith(PARTS["vision"])}
    checkpoint = Checkpoint(
        path=directory,
        layout="llama" if fields.get("model_type", "llama") == "llama" else "share4v",
        tensors={key: tensor for key, tensor in tensors.items() if key not in inside},
        text=configs.read_text(fields, model_types=_MODEL_TYPES),
        projector=_projector_kind(tensors) if has_projector else None,
        tokenizer_file=companions.find_tokenizer(directory),
        usage=Usage(generation=companions.read_generation(directory)),
    )
    checkpoint = adapted(directory, checkpoint, with_tower=with_tower and not inside)
    if not inside or not with_tower:
        return checkpoint
    # LLaVA's towers are inside, and `mm_vision_tower` only says which one it is.
    tower = _find_tower(directory, fields)
    vision = open_tower(tower).vision if tower else _inferred_tower(directory, inside)
    return checkpoint.with_part("vision", Checkpoint(directory, "clip", inside, vision=vision))


def adapted(directory: pathlib.Path, checkpoint: Checkpoint, *, with_tower: bool = True) -> Checkpoint:
    """A checkpoint as the config.json in a directory, of its own or of a LoRA, wants it used.

    Raises:
      ConversionError: the config is for another decoder, or asks for what can't be done.
    """
    fields = read_json(directory / "config.json")
    text = configs.read_text(fields, model_types=_MODEL_TYPES)
    if text != checkpoint.text:
        raise ConversionError(
            [f"{directory}/config.json says {text}, {checkpoint.path} is {checkpoint.text}"]
        )
    is_plain = fields.get("model_type", "llama") == "llama"
    aspect = fields.get("image_aspect_ratio") or (checkpoint.usage.aspect if is_plain else "square")
    if aspect not in ASPECTS:
        supported = ", ".join(ASPECTS)
        raise ConversionError(
            [f"{directory}/config.json: image_aspect_ratio {aspect!r}; supported: {supported}"]
        )
    layer, feature = checkpoint.features
    layer = fields.get("mm_vision_select_layer", layer)
    feature = fields.get("mm_vision_select_feature", feature)
    checkpoint = dataclasses.replace(
        checkpoint,
        projector=fields.get("mm_projector_type", checkpoint.projector),
        features=(layer, feature),
        usage=dataclasses.replace(checkpoint.usage, aspect=aspect),
    )
    tower = _find_tower(directory, fields) if with_tower else None
    return checkpoint if tower is None else checkpoint.with_part("vision", open_tower(tower))


def open_tower(directory: pathlib.Path) -> Checkpoint:
    """Opens a vision tower: a CLIPVisionModel or a whole CLIP.

    Raises:
      ConversionError: see `open_share4v`.
    """
    vision = configs.read_vision(read_json(directory / "config.json"))
    tensors = by_canonical_name(open_tensors(directory)) if has_weights(directory) else {}
    return Checkpoint(directory, "clip", tensors, vision=vision)


def open_projector(path: pathlib.Path) -> Checkpoint:
    """Opens a file with a projector, like LLaVA's mm_projector.bin.

    Raises:
      ConversionError: it can't be read, or holds something else.
    """
    tensors = by_canonical_name(open_file(path))
    others = [tensor.name for key, tensor in tensors.items() if not key.startswith(PARTS["projector"])]
    if others or not tensors:
        raise ConversionError([f"{path} is no projector: it has {', '.join(others[:3]) or 'no tensors'}"])
    return Checkpoint(path, "projector", tensors, projector=_projector_kind(tensors))


def write_share4v(
    directory: pathlib.Path,
    checkpoint: Checkpoint,
    stream: Stream,
    *,
    dtype: str,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes a checkpoint that ShareGPT4V's code reads, as safetensors.

    The tower goes to the sub-directory `vision_tower`, and `mm_vision_tower` is that name. Their
    code takes it relative to where it runs: give it a full path there, or set it in config.json.

    Args:
      directory: an empty one.
      checkpoint: a whole model.
      stream: what reads its tensors.
      dtype: what config.json says that the weights are.
      max_shard_bytes: the largest file.

    Raises:
      ConversionError: a tensor can't be read.
      ValueError: unknown aspect, or a tokenizer of another vocabulary.
    """
    config, usage = checkpoint.config, checkpoint.usage
    write_json(directory / "config.json", write_config(config, dtype, usage.aspect))
    companions.write_generation(directory, usage.generation, pad_id=0)
    if checkpoint.tokenizer_file is not None:
        companions.write_tokenizer(directory, checkpoint.tokenizer_file, config, added_tokens=False)
    tower = directory / _TOWER
    tower.mkdir()
    vision = {"architectures": ["CLIPVisionModel"], "torch_dtype": dtype}
    write_json(tower / "config.json", {**vision, **configs.write_vision(config.vision)})
    # Padding is the business of share4v's code: the processor of its tower is CLIP's.
    companions.write_preprocessor(tower, config.vision, "square")
    inside: list[Tensor] = []
    outside: list[Tensor] = []
    for entry in entries(config):
        tensor = checkpoint.tensors[entry.key]
        part = outside if entry.key.startswith(PARTS["vision"]) else inside
        part.append(tensor.renamed(share4v_name(entry.key, config.projector)))
    write_tensors(tower, outside, stream, max_shard_bytes=max_shard_bytes)
    write_tensors(directory, inside, stream, max_shard_bytes=max_shard_bytes)


def write_config(config: ModelConfig, dtype: str, aspect: str) -> dict[str, Any]:
    """config.json as ShareGPT4V's training leaves it (spec 3.2)."""
    return {
        **configs.write_text(config.text),
        "architectures": ["Share4VLlamaForCausalLM"],
        "model_type": "share4v",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "image_aspect_ratio": aspect,
        "image_grid_pinpoints": None,
        "mm_hidden_size": config.vision.hidden_size,
        "mm_projector_type": config.projector,
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": config.vision.select_feature,
        "mm_vision_select_layer": config.vision.select_layer,
        "mm_vision_tower": _TOWER,
        "torch_dtype": dtype,
        "use_cache": True,
        "use_mm_proj": True,
    }


def _find_tower(directory: pathlib.Path, fields: Mapping[str, Any]) -> pathlib.Path | None:
    named = [fields["mm_vision_tower"]] if isinstance(fields.get("mm_vision_tower"), str) else []
    candidates = {(directory / name).resolve(): directory / name for name in (*named, _TOWER)}
    found = [path for path in candidates.values() if (path / "config.json").exists()]
    if len(found) > 1:
        # share4v's training saves a tuned tower inside, and leaves the name of the origin as it was.
        raise ConversionError(
            [f"two vision towers, {found[0]} (by config.json) and {found[1]}: say which as --vision-tower"]
        )
    return found[0] if found else None


def _projector_kind(tensors: Mapping[str, Tensor]) -> str:
    """The projector that the tensors make up, for configs from before there was a choice."""
    depth = sum(key.startswith(PARTS["projector"]) and key.endswith(".weight") for key in tensors)
    return "linear" if depth <= 1 else f"mlp{depth}x_gelu"


def _inferred_tower(directory: pathlib.Path, tensors: Mapping[str, Tensor]) -> VisionConfig:
    """The shapes of a tower without a config.json. What they don't say is as in every CLIP ViT."""
    prefix = f"{PARTS['vision']}vision_model."
    shapes = {key.removeprefix(prefix): tensor.shape for key, tensor in tensors.items()}
    try:
        hidden, _, patch, _ = shapes["embeddings.patch_embedding.weight"]
        side = math.isqrt(shapes["embeddings.position_embedding.weight"][0] - 1)
        return VisionConfig(
            hidden_size=hidden,
            intermediate_size=shapes["encoder.layers.0.mlp.fc1.weight"][0],
            num_layers=sum(key.endswith("mlp.fc1.weight") for key in shapes),
            num_heads=hidden // _CLIP_HEAD_DIM,
            image_size=side * patch,
            patch_size=patch,
        )
    except (KeyError, ValueError, IndexError) as error:
        raise ConversionError([f"{directory}: the vision tower inside is no CLIP ViT ({error!r})"]) from error
