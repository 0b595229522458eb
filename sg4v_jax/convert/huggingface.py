"""Hugging Face's LLaVA format: the checkpoints `transformers` reads and writes (spec 5.2)."""

import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from sg4v_jax.convert import companions, configs
from sg4v_jax.convert.files import (
    MAX_SHARD_BYTES,
    new_directory,
    open_tensors,
    read_json,
    write_json,
    write_tensors,
)
from sg4v_jax.convert.names import table
from sg4v_jax.convert.tensors import ConversionError, from_params, padded_vocab_size, to_params
from sg4v_jax.models.config import ModelConfig
from sg4v_jax.models.projector import projector_depth

# LlavaConfig's own defaults: a file without `vision_config` means CLIP ViT-L/14-336.
_VISION = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
_FIXED = {"model_type": "llava", "projector_hidden_act": "gelu", "multimodal_projector_bias": True}
_FEATURES = {"default": "patch", "full": "cls_patch"}


def load_llava(
    directory: str | os.PathLike[str], *, tuned_from: int = 0
) -> tuple[ModelConfig, dict[str, Any]]:
    """Loads a LLaVA-1.5 checkpoint in Hugging Face's format.

    Reads safetensors or PyTorch files, sharded or not, with the tensor names of any version of
    transformers. The vocabulary loses the rows that the format adds to it (`<image>`, `<pad>` and
    padding), which mean nothing.

    Args:
      directory: a local directory.
      tuned_from: where to split the vision tower (see `models.config.VisionConfig`).

    Returns:
      (config, params): NumPy arrays in the dtype of the file, for `models.sharegpt4v`.

    Raises:
      ConversionError: files are missing or damaged, the config asks for what the model here can't
        do, or tensors don't fit it. Lists everything that is wrong.
    """
    directory = pathlib.Path(directory)
    config = read_config(read_json(directory / "config.json"), tuned_from=tuned_from)
    return config, to_params(config, open_tensors(directory))


def read_config(fields: Mapping[str, Any], *, tuned_from: int = 0) -> ModelConfig:
    """The model that a LLaVA config.json describes.

    Raises:
      ConversionError: with what the model here can't be.
    """
    problems = [f"config.json: {problem}" for problem in configs.unsupported(fields, _FIXED)]
    select_layer = fields.get("vision_feature_layer", -2)
    strategy = fields.get("vision_feature_select_strategy", "default")
    if not isinstance(select_layer, int):
        problems.append(f"config.json: vision_feature_layer is {select_layer}; supported: one layer")
    if strategy not in _FEATURES:
        supported = ", ".join(map(repr, _FEATURES))
        problems.append(
            f"config.json: vision_feature_select_strategy is {strategy!r}; supported: {supported}"
        )
    if problems:
        raise ConversionError(problems)
    text_fields = dict(fields.get("text_config") or {})
    # `<image>` is the first row the format adds, if what follows is no more than its padding.
    image, rows = fields.get("image_token_index", 32000), text_fields.get("vocab_size", 32000)
    if image <= rows <= padded_vocab_size(image):
        text_fields["vocab_size"] = image
    return ModelConfig(
        vision=configs.read_vision(
            fields.get("vision_config") or _VISION,
            select_layer=select_layer,
            select_feature=_FEATURES[strategy],
            tuned_from=tuned_from,
        ),
        text=configs.read_text(text_fields),
    )


def save_llava(
    directory: str | os.PathLike[str],
    config: ModelConfig,
    params: Mapping[str, Any],
    *,
    tokenizer_file: str | os.PathLike[str] | None,
    dtype: str = "bfloat16",
    template: str = "v1",
    aspect: str = "pad",
    max_shard_bytes: int = MAX_SHARD_BYTES,
    overwrite: bool = False,
) -> None:
    """Writes a checkpoint that `LlavaForConditionalGeneration` and `AutoProcessor` load.

    The format needs two tokens more than LLaMA has, `<image>` and `<pad>`: they follow the
    vocabulary, which is then padded to a multiple of 64 (32000 rows become 32064). The new rows of
    the embedding and of the head are the mean of the old ones: `<image>` is always overwritten
    with features, the others never occur, and generation_config.json keeps all from being sampled.

    Args:
      directory: appears when it is complete, or not at all.
      config: the model.
      params: its parameters, NumPy or JAX arrays.
      tokenizer_file: LLaMA's tokenizer.model; without one (None) only the model can be loaded.
      dtype: `bfloat16`, `float16` or `float32`.
      template: name of the prompt template, for the processor (see `data.conversation`).
      aspect: how the processor makes images square, `pad` (fine-tuning, inference) or `square`.
      max_shard_bytes: the largest file.
      overwrite: whether to replace a directory that isn't empty.

    Raises:
      ConversionError: the parameters don't fit the config, or the format has no such model.
      FileExistsError: the directory isn't empty, and `overwrite` wasn't given.
      ValueError: unknown dtype, template or aspect, or a tokenizer of another vocabulary.
    """
    if projector_depth(config.projector) != 2:
        raise ConversionError(
            [f"Hugging Face's LLaVA has a projector mlp2x_gelu, not {config.projector}; use save_share4v"]
        )
    size, rows = config.text.vocab_size, padded_vocab_size(config.text.vocab_size)
    tensors = from_params(config, params)
    with new_directory(directory, overwrite=overwrite) as partial:
        write_json(partial / "config.json", write_config(config, dtype))
        companions.write_generation(partial, pad_id=size + 1, never=range(size, rows))
        companions.write_preprocessor(partial, config.vision, aspect)
        companions.write_processor(partial, config.vision, template)
        if tokenizer_file is not None:
            companions.write_tokenizer(partial, tokenizer_file, config, added_tokens=True)
        padded = _pad_vocabulary(config, tensors, rows)
        write_tensors(partial, padded, dtype=dtype, max_shard_bytes=max_shard_bytes)


def write_config(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """The inverse of `read_config`."""
    size = config.text.vocab_size
    text = {**configs.write_text(config.text), "vocab_size": padded_vocab_size(size)}
    return {
        **_FIXED,
        "architectures": ["LlavaForConditionalGeneration"],
        "ignore_index": -100,
        "image_seq_length": config.vision.num_image_tokens,
        "image_token_index": size,
        "pad_token_id": size + 1,
        "text_config": text,
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
        "vision_config": configs.write_vision(config.vision),
        "vision_feature_layer": config.vision.select_layer,
        "vision_feature_select_strategy": companions.select_strategy(config.vision),
    }


def _pad_vocabulary(
    config: ModelConfig, tensors: Iterable[tuple[str, np.ndarray]], rows: int
) -> Iterator[tuple[str, np.ndarray]]:
    padded = {row.key for row in table(config) if row.padded}
    for key, array in tensors:
        if key in padded:
            mean = array.mean(axis=0, dtype=np.float64).astype(array.dtype)
            array = np.concatenate([array, np.broadcast_to(mean, (rows - len(array), *mean.shape))])
        yield key, array
