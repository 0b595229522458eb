"""The original format of ShareGPT4V: decoder and projector, with the vision tower apart (spec 5.1)."""

import itertools
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from sg4v_jax.convert import companions, configs
from sg4v_jax.convert.files import (
    MAX_SHARD_BYTES,
    Tensors,
    new_directory,
    open_file,
    open_tensors,
    read_json,
    write_json,
    write_tensors,
)
from sg4v_jax.convert.names import canonical_name, share4v_name
from sg4v_jax.convert.tensors import ConversionError, from_params, to_params
from sg4v_jax.models.config import ModelConfig

_TOWER, _PROJECTOR = "vision_tower", "multi_modal_projector"
# LLaVA differs in the name only, and Vicuna, to start from, in having no projector yet.
_MODEL_TYPES = ("share4v", "llava", "llama")


def load_share4v(
    directory: str | os.PathLike[str],
    *,
    vision_tower: str | os.PathLike[str] | None = None,
    projector: str | os.PathLike[str] | None = None,
    tuned_from: int = 0,
) -> tuple[ModelConfig, dict[str, Any]]:
    """Loads a checkpoint in the original format of ShareGPT4V or LLaVA-1.5.

    Args:
      directory: decoder and projector: config.json and PyTorch or safetensors files. May hold the
        tower's weights too, as LLaVA-1.5's do.
      vision_tower: directory of the tower, a CLIPVisionModel or a whole CLIP. By default what
        `mm_vision_tower` names, relative to `directory`, or else its sub-directory `vision_tower`.
      projector: a file (`mm_projector.bin`) whose projector replaces that of `directory`. With
        Vicuna's directory and CLIP's, this is where pre-training starts.
      tuned_from: where to split the vision tower (see `models.config.VisionConfig`).

    Returns:
      (config, params): NumPy arrays in the dtype of the files, for `models.sharegpt4v`.

    Raises:
      ConversionError: files are missing or damaged, a config asks for what the model here can't
        do, or tensors don't fit it. Lists everything that is wrong.
    """
    directory = pathlib.Path(directory)
    fields = read_json(directory / "config.json")
    tower = _find_tower(directory, fields, vision_tower)
    tensors = open_tensors(directory)
    if projector is not None:
        tensors = tensors.select(lambda name: not _is_part(name, _PROJECTOR))
        tensors |= open_file(pathlib.Path(projector))
    if not any(_is_part(name, _TOWER) for name in tensors):
        tensors |= open_tensors(tower)
    config = ModelConfig(
        vision=configs.read_vision(
            read_json(tower / "config.json"),
            select_layer=fields.get("mm_vision_select_layer", -2),
            select_feature=fields.get("mm_vision_select_feature", "patch"),
            tuned_from=tuned_from,
        ),
        text=configs.read_text(fields, model_types=_MODEL_TYPES),
        projector=fields.get("mm_projector_type") or _projector_kind(tensors),
    )
    return config, to_params(config, tensors)


def save_share4v(
    directory: str | os.PathLike[str],
    config: ModelConfig,
    params: Mapping[str, Any],
    *,
    tokenizer_file: str | os.PathLike[str] | None,
    dtype: str = "bfloat16",
    aspect: str = "pad",
    max_shard_bytes: int = MAX_SHARD_BYTES,
    overwrite: bool = False,
) -> None:
    """Writes a checkpoint that ShareGPT4V's code reads, as safetensors.

    The tower goes to the sub-directory `vision_tower`, and `mm_vision_tower` is that name. Their
    code takes it relative to where it runs: give it a full path there, or set it in config.json.

    Args:
      directory: appears when it is complete, or not at all.
      config: the model.
      params: its parameters, NumPy or JAX arrays.
      tokenizer_file: LLaMA's tokenizer.model, or None to leave it out.
      dtype: `bfloat16`, `float16` or `float32`.
      aspect: `image_aspect_ratio`: `pad` (fine-tuning, inference) or `square` (pre-training).
      max_shard_bytes: the largest file.
      overwrite: whether to replace a directory that isn't empty.

    Raises:
      ConversionError: the parameters don't fit the config.
      FileExistsError: the directory isn't empty, and `overwrite` wasn't given.
      ValueError: unknown dtype or aspect, or a tokenizer of another vocabulary.
    """
    tensors = from_params(config, params)
    with new_directory(directory, overwrite=overwrite) as partial:
        write_json(partial / "config.json", write_config(config, dtype, aspect))
        companions.write_generation(partial, pad_id=0)
        if tokenizer_file is not None:
            companions.write_tokenizer(partial, tokenizer_file, config, added_tokens=False)
        tower = partial / _TOWER
        tower.mkdir()
        vision = {"architectures": ["CLIPVisionModel"], "torch_dtype": dtype}
        write_json(tower / "config.json", {**vision, **configs.write_vision(config.vision)})
        # Padding is the business of share4v's code: the processor of its tower is CLIP's.
        companions.write_preprocessor(tower, config.vision, "square")
        # The tower's tensors follow each other, so that each parameter visits the host only once.
        for is_tower, group in itertools.groupby(tensors, key=lambda item: _is_part(item[0], _TOWER)):
            named = ((share4v_name(key, config.projector), array) for key, array in group)
            where = tower if is_tower else partial
            write_tensors(where, named, dtype=dtype, max_shard_bytes=max_shard_bytes)


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


def _find_tower(
    directory: pathlib.Path, fields: Mapping[str, Any], given: str | os.PathLike[str] | None
) -> pathlib.Path:
    if given is not None:
        candidates = [pathlib.Path(given)]
    else:
        candidates = [directory / (fields.get("mm_vision_tower") or _TOWER), directory / _TOWER]
    for candidate in candidates:
        if (candidate / "config.json").exists():
            return candidate
    looked = " or ".join(str(candidate) for candidate in dict.fromkeys(candidates))
    raise ConversionError([f"no vision tower at {looked}: fetch it and give its directory as vision_tower"])


def _is_part(name: str, part: str) -> bool:
    return (canonical_name(name) or "").startswith(f"{part}.")


def _projector_kind(tensors: Tensors) -> str:
    """The projector that the tensors make up, for configs from before there was a choice."""
    depth = sum(_is_part(name, _PROJECTOR) and name.endswith(".weight") for name in tensors)
    return "linear" if depth <= 1 else f"mlp{depth}x_gelu"
