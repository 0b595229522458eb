"""Hugging Face's LLaVA format: the checkpoints `transformers` reads and writes (spec 5.2)."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

from sg4v_jax.convert import companions, configs
from sg4v_jax.convert.checkpoint import Checkpoint, Usage
from sg4v_jax.convert.files import MAX_SHARD_BYTES, Stream, open_tensors, read_json, write_json, write_tensors
from sg4v_jax.convert.names import entries
from sg4v_jax.convert.params import by_canonical_name, padded_vocab_size, without_added_rows
from sg4v_jax.convert.tensors import ConversionError
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


def open_llava(directory: pathlib.Path) -> Checkpoint:
    """Opens a LLaVA-1.5 checkpoint in Hugging Face's format.

    Takes safetensors or PyTorch files, sharded or not, with the tensor names of any version of
    transformers. The vocabulary loses the rows that the format adds to it (`<image>`, `<pad>` and
    padding), which mean nothing.

    Raises:
      ConversionError: files are missing or damaged, or the config asks for what the model here
        can't do. Lists everything that is wrong.
    """
    config = read_config(read_json(directory / "config.json"))
    return Checkpoint(
        path=directory,
        layout="hf",
        tensors=without_added_rows(by_canonical_name(open_tensors(directory)), config.text.vocab_size),
        vision=config.vision,
        text=config.text,
        projector=config.projector,
        features=(config.vision.select_layer, config.vision.select_feature),
        tokenizer_file=companions.find_tokenizer(directory),
        usage=Usage(
            aspect=companions.read_aspect(directory),
            chat_template=companions.read_chat_template(directory),
            generation=companions.read_generation(directory),
        ),
    )


def read_config(fields: Mapping[str, Any]) -> ModelConfig:
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
    vision = configs.read_vision(fields.get("vision_config") or _VISION)
    vision = dataclasses.replace(vision, select_layer=select_layer, select_feature=_FEATURES[strategy])
    return ModelConfig(vision, configs.read_text(text_fields))


def write_llava(
    directory: pathlib.Path,
    checkpoint: Checkpoint,
    stream: Stream,
    *,
    dtype: str,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes a checkpoint that `LlavaForConditionalGeneration` and `AutoProcessor` load.

    The format needs two tokens more than LLaMA has, `<image>` and `<pad>`: they follow the
    vocabulary, which is then padded to a multiple of 64 (32000 rows become 32064). The new rows of
    the embedding and of the head are the mean of the old ones: `<image>` is always overwritten
    with features, the others never occur, and generation_config.json keeps all from being sampled.

    Args:
      directory: an empty one.
      checkpoint: a whole model.
      stream: what reads its tensors.
      dtype: what config.json says that the weights are.
      max_shard_bytes: the largest file.

    Raises:
      ConversionError: the format has no such model, or a tensor can't be read.
      ValueError: unknown template or aspect, or a tokenizer of another vocabulary.
    """
    config, usage = checkpoint.config, checkpoint.usage
    if projector_depth(config.projector) != 2:
        raise ConversionError(
            [f"Hugging Face's LLaVA has a projector mlp2x_gelu, not {config.projector}; use share4v"]
        )
    size, rows = config.text.vocab_size, padded_vocab_size(config.text.vocab_size)
    write_json(directory / "config.json", write_config(config, dtype))
    companions.write_generation(directory, usage.generation, pad_id=size + 1, never=range(size, rows))
    companions.write_preprocessor(directory, config.vision, usage.aspect)
    companions.write_processor(directory, config.vision, usage.template, usage.chat_template)
    if checkpoint.tokenizer_file is not None:
        companions.write_tokenizer(directory, checkpoint.tokenizer_file, config, added_tokens=True)
    tensors = []
    for entry in entries(config):
        tensor = checkpoint.tensors[entry.key].renamed(entry.key)
        tensors.append(tensor.padded_with_mean(rows) if entry.row.padded else tensor)
    write_tensors(directory, tensors, stream, max_shard_bytes=max_shard_bytes)


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
