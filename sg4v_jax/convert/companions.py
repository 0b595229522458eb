"""The small files beside the weights: tokenizer, image preprocessing, prompt, generation."""

import json
import os
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

from sg4v_jax.convert.files import read_json, write_json
from sg4v_jax.convert.tokenizer_json import tokenizer_json
from sg4v_jax.data.conversation import Template, get_template
from sg4v_jax.data.image import ASPECTS
from sg4v_jax.data.records import IMAGE_PLACEHOLDER
from sg4v_jax.data.tokenizer import Tokenizer
from sg4v_jax.models.config import CLIP_MEAN, CLIP_STD, ModelConfig, VisionConfig

# What share4v trains and serves with (spec 3.6).
_SHARE4V_MAX_LENGTH = 2048
_CHAT_TEMPLATE_FILE = "chat_template.jinja"
_FORMAT_S_OWN = {
    "_from_model_config",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "suppress_tokens",
    "transformers_version",
}


def write_tokenizer(
    directory: pathlib.Path,
    tokenizer_file: str | os.PathLike[str],
    config: ModelConfig,
    *,
    added_tokens: bool,
) -> None:
    """Writes tokenizer.model, tokenizer_config.json, special_tokens_map.json and, for HF, tokenizer.json.

    Args:
      directory: where to.
      tokenizer_file: LLaMA's SentencePiece model.
      config: the model.
      added_tokens: whether to add `<image>` and `<pad>` after the vocabulary, as HF's format does.
        share4v's has neither, and is read with SentencePiece.

    Raises:
      ValueError: the tokenizer's vocabulary isn't the model's.
    """
    tokenizer = Tokenizer(tokenizer_file)
    size = config.text.vocab_size
    if tokenizer.vocab_size != size:
        raise ValueError(f"{tokenizer_file} has {tokenizer.vocab_size} pieces, the model {size} tokens")
    shutil.copyfile(tokenizer_file, directory / "tokenizer.model")
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    ids = {"<unk>": tokenizer.unk_id, "<s>": tokenizer.bos_id, "</s>": tokenizer.eos_id}
    content: dict[str, Any] = {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": True,
        "add_eos_token": False,
        "legacy": False,
        "clean_up_tokenization_spaces": False,
        "padding_side": "right",
        "model_max_length": min(_SHARE4V_MAX_LENGTH, config.text.max_positions),
        "pad_token": None,
    }
    if added_tokens:
        special |= {"pad_token": "<pad>"}
        ids |= {IMAGE_PLACEHOLDER: size, "<pad>": size + 1}
        # Prompts of a batch must all end where generation starts, and count their image tokens.
        content |= {"padding_side": "left", "model_max_length": config.text.max_positions}
        content |= {"processor_class": "LlavaProcessor"}
        write_json(directory / "tokenizer.json", tokenizer_json(tokenizer_file, ids))
    flags = dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), False)
    decoder = {str(i): {"content": token, "special": True, **flags} for token, i in ids.items()}
    write_json(directory / "tokenizer_config.json", {**content, **special, "added_tokens_decoder": decoder})
    write_json(directory / "special_tokens_map.json", special)


def write_preprocessor(directory: pathlib.Path, config: VisionConfig, aspect: str) -> None:
    """Writes preprocessor_config.json: what `data.image.preprocess` does.

    Args:
      directory: where to.
      config: the vision tower.
      aspect: a name in `data.image.ASPECTS`. To pad needs LLaVA's image processor (transformers
        4.49 and newer); CLIP's, with which older ones make do, would crop.

    Raises:
      ValueError: there is no such aspect.
    """
    if aspect not in ASPECTS:
        raise ValueError(f"aspect {aspect!r} is not one of {', '.join(ASPECTS)}")
    size = config.image_size
    content = {
        "image_processor_type": "LlavaImageProcessor" if aspect == "pad" else "CLIPImageProcessor",
        "processor_class": "LlavaProcessor",
        "do_convert_rgb": True,
        "do_pad": aspect == "pad",
        "do_resize": True,
        "size": {"shortest_edge": size},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": CLIP_MEAN,
        "image_std": CLIP_STD,
    }
    write_json(directory / "preprocessor_config.json", content)


def write_processor(
    directory: pathlib.Path, config: VisionConfig, template: str, chat_text: str = ""
) -> None:
    """Writes processor_config.json and the template of the prompt, chat_template.jinja.

    Args:
      directory: where to.
      config: the vision tower.
      template: name of the template (see `data.conversation`).
      chat_text: Jinja that is written instead of that which says the same as `template`.

    Raises:
      ValueError: there is no such template.
    """
    content = {
        "processor_class": "LlavaProcessor",
        "image_token": IMAGE_PLACEHOLDER,
        "patch_size": config.patch_size,
        "num_additional_image_tokens": 1,
        "vision_feature_select_strategy": select_strategy(config),
    }
    write_json(directory / "processor_config.json", content)
    text = chat_text or chat_template(get_template(template))
    (directory / _CHAT_TEMPLATE_FILE).write_text(text, encoding="utf-8")


def write_generation(
    directory: pathlib.Path, fields: Mapping[str, Any], *, pad_id: int, never: range = range(0)
) -> None:
    """Writes generation_config.json.

    Args:
      directory: where to.
      fields: what it says beside ids, as `read_generation` gives it.
      pad_id: what finished rows are filled with.
      never: ids that are not to be sampled.
    """
    content: dict[str, Any] = {**fields, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": pad_id}
    if never:
        content["suppress_tokens"] = list(never)
    write_json(directory / "generation_config.json", content)


def find_tokenizer(directory: pathlib.Path) -> pathlib.Path | None:
    """A directory's SentencePiece model, None if it has none."""
    path = directory / "tokenizer.model"
    return path if path.is_file() else None


def read_generation(directory: pathlib.Path) -> dict[str, Any]:
    """What generation_config.json says beside the ids, which belong to the format."""
    path = directory / "generation_config.json"
    fields = read_json(path) if path.is_file() else {}
    return {key: value for key, value in fields.items() if key not in _FORMAT_S_OWN}


def read_aspect(directory: pathlib.Path) -> str:
    """How an HF directory's image processor makes images square."""
    fields: dict[str, Any] = {}
    if (directory / "processor_config.json").is_file():  # where transformers 5 puts it, and looks first
        fields = read_json(directory / "processor_config.json").get("image_processor") or {}
    if not fields and (directory / "preprocessor_config.json").is_file():
        fields = read_json(directory / "preprocessor_config.json")
    return "pad" if not fields or fields.get("do_pad") else "square"


def read_chat_template(directory: pathlib.Path) -> str:
    """An HF directory's chat template, in either of the files it may be in; empty if in none."""
    if (directory / _CHAT_TEMPLATE_FILE).is_file():
        return (directory / _CHAT_TEMPLATE_FILE).read_text(encoding="utf-8")
    older = directory / "chat_template.json"
    return str(read_json(older).get("chat_template", "")) if older.is_file() else ""


def select_strategy(config: VisionConfig) -> str:
    """HF's name for `select_feature`."""
    return {"patch": "default", "cls_patch": "full"}[config.select_feature]


def chat_template(template: Template) -> str:
    """A template as Jinja over HF's messages: renders what `data.conversation.render` does.

    The system text belongs to the template, so that a system message is an error. A question's
    images come first, wherever they stand in the message.
    """
    texts = {
        "opening": template.opening,
        "reopening": ("<s>" if template.starts_with_bos else "") + template.reopening,
        "image": IMAGE_PLACEHOLDER + ("" if template.images_only else "\n"),
        "closing": template.closing,
        "before_answer": template.before_answer,
        "after_answer": template.after_answer + ("</s>" if template.ends_with_eos else ""),
        "images_only": template.images_only,
    }
    settings = "".join(f"{{%- set {name} = {json.dumps(text)} -%}}\n" for name, text in texts.items())
    return settings + _CHAT_TEMPLATE


_CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message['content'] is string -%}
{%- set images, text = '', message['content'] -%}
{%- else -%}
{%- set parts = message['content'] -%}
{%- set images = image * (parts | selectattr('type', 'equalto', 'image') | list | length) -%}
{%- set text = parts | selectattr('type', 'equalto', 'text') | map(attribute='text') | join -%}
{%- endif -%}
{%- if message['role'] == 'user' -%}
{%- set question = images if images_only else (images + text) | trim if images else text -%}
{{- (opening if loop.first else reopening) + question + closing -}}
{%- elif message['role'] == 'assistant' -%}
{{- before_answer + text + after_answer -}}
{%- else -%}
{{- raise_exception("this model's prompt has a fixed system text; found a message by " + message['role']) -}}
{%- endif -%}
{%- endfor -%}
"""
