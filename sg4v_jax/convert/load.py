"""Any model in, any format out."""

import dataclasses
import os
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import jax

from sg4v_jax.convert import companions, huggingface, lora, orbax, share4v
from sg4v_jax.convert.bundle import ModelBundle
from sg4v_jax.convert.checkpoint import Checkpoint, Usage
from sg4v_jax.convert.files import MAX_SHARD_BYTES, Stream, new_directory, read_json, write_json
from sg4v_jax.convert.params import from_params, to_params
from sg4v_jax.convert.tensors import DTYPES, ConversionError
from sg4v_jax.data.conversation import TEMPLATES, get_template
from sg4v_jax.models.config import ModelConfig, VisionConfig
from sg4v_jax.models.sharegpt4v import init_params

FORMATS = ("hf", "share4v", "run")
# No format but a run says how a model was trained to be prompted; a small file of our own does. What
# the format's own files say is left to them, for people edit those.
USAGE = "sg4v.json"
_IN_FORMAT = {"hf": {"aspect", "chat_template", "generation"}, "share4v": {"aspect", "generation"}}
RANDOM = "random"


def open_checkpoint(
    path: str | os.PathLike[str],
    *,
    vision_tower: str | os.PathLike[str] | None = None,
    projector: str | os.PathLike[str] | None = None,
    base: str | os.PathLike[str] | None = None,
) -> Checkpoint:
    """Opens a model, or parts of one, in any known format. Reads no weights yet.

    Args:
      path: a training run, an HF LLaVA directory, an original share4v or LLaVA-1.5 directory, a
        LoRA on top of one, a LLaMA (Vicuna), a CLIP, or the file of a projector.
      vision_tower: where the vision tower comes from instead, or `random`.
      projector: where the projector comes from instead, or `random`.
      base: for a LoRA, the model it was trained on top of.

    Raises:
      FileNotFoundError: `path` is nothing of the kind.
      ConversionError: files are missing or damaged, or a config asks for what can't be done.
    """
    checkpoint = _open(pathlib.Path(path), base, with_tower=vision_tower is None)
    if vision_tower is not None:
        checkpoint = checkpoint.with_part("vision", _part("vision", vision_tower, checkpoint))
    if projector is not None:
        checkpoint = checkpoint.with_part("projector", _part("projector", projector, checkpoint))
    return checkpoint


def open_part(path: str | os.PathLike[str], part: str) -> Checkpoint:
    """Opens what one of `checkpoint.PARTS` is to be taken from; see `open_checkpoint`.

    Which tower a decoder or projector had is not asked: there may be none, or two.
    """
    return _open(pathlib.Path(path), None, with_tower=part == "vision")


def _open(path: pathlib.Path, base: str | os.PathLike[str] | None, with_tower: bool) -> Checkpoint:
    if path.is_file():
        return share4v.open_projector(path)
    if orbax.is_run(path):
        return orbax.open_run(path)
    if (path / lora.ADAPTER).is_file():
        return lora.merge_lora(path, _lora_base(path, base, with_tower))
    if not (path / "config.json").is_file():
        raise FileNotFoundError(
            f"{path} is no model: it has neither {orbax.CHECKPOINTS}/ (a training run of this library) "
            "nor config.json (Hugging Face LLaVA, original share4v, LLaMA, CLIP)"
        )
    fields = read_json(path / "config.json")
    if fields.get("text_config") and fields.get("model_type") != "clip":
        return _with_usage(huggingface.open_llava(path))
    if str(fields.get("model_type")).startswith("clip"):
        return share4v.open_tower(path)
    return _with_usage(share4v.open_share4v(path, with_tower=with_tower))


def _lora_base(path: pathlib.Path, base: str | os.PathLike[str] | None, with_tower: bool) -> Checkpoint:
    found = _open(pathlib.Path(lora.base_of(path) if base is None else base), None, with_tower)
    if not (path / "config.json").is_file():
        return found
    # What the adapter's own config says of projector, features and tower counts.
    return share4v.adapted(path, found, with_tower=with_tower)


def _part(name: str, source: str | os.PathLike[str], checkpoint: Checkpoint) -> Checkpoint:
    if source != RANDOM:
        return open_part(source, name)
    kind = checkpoint.projector or ModelConfig().projector
    if checkpoint.text is None:
        raise ConversionError([f"{checkpoint.path}: a random {name} needs a decoder to fit"])
    config = ModelConfig(checkpoint.vision or VisionConfig(), checkpoint.text, kind)
    # XLA leaves out what isn't returned: the other parts are never made.
    made = jax.jit(lambda key: init_params(config, key)[name])(jax.random.key(0))
    shapes = jax.eval_shape(lambda key: init_params(config, key), jax.random.key(0))
    tensors = from_params(config, {**shapes, name: made})
    made_checkpoint = Checkpoint(
        pathlib.Path(RANDOM), "memory", tensors, config.vision, config.text, config.projector
    )
    return made_checkpoint.cast(DTYPES[checkpoint.dtype])


def _with_usage(checkpoint: Checkpoint) -> Checkpoint:
    """Adds what `sg4v.json` says."""
    usage = checkpoint.usage
    if (checkpoint.path / USAGE).is_file():
        known = {field.name for field in dataclasses.fields(Usage)}
        said = {key: value for key, value in read_json(checkpoint.path / USAGE).items() if key in known}
        usage = dataclasses.replace(usage, **said)
    for name in (usage.template, *TEMPLATES):
        if usage.chat_template == companions.chat_template(get_template(name)):
            usage = dataclasses.replace(usage, template=name, chat_template="")
    return dataclasses.replace(checkpoint, usage=usage)


def load_model(path: str | os.PathLike[str], **parts: Any) -> ModelBundle:
    """Loads a whole model into host memory.

    Args:
      path, parts: see `open_checkpoint`.

    Raises:
      FileNotFoundError: if `path` is no model.
      ConversionError: if its weights don't fit its config.
    """
    if orbax.is_run(pathlib.Path(path)) and not parts:
        return orbax.load_run(pathlib.Path(path))
    checkpoint = open_checkpoint(path, **parts)
    usage = checkpoint.usage
    return ModelBundle(
        checkpoint.config,
        to_params(checkpoint.config, checkpoint.checked().tensors),
        checkpoint.tokenizer_file,
        usage.template,
        usage.aspect,
        usage.prompt,
    )


def as_checkpoint(bundle: ModelBundle) -> Checkpoint:
    """A model in memory as a checkpoint, to be written."""
    config = bundle.config
    return Checkpoint(
        path=pathlib.Path("memory"),
        layout="memory",
        tensors=from_params(config, bundle.params),
        vision=dataclasses.replace(config.vision, tuned_from=0),
        text=config.text,
        projector=config.projector,
        features=(config.vision.select_layer, config.vision.select_feature),
        tokenizer_file=bundle.tokenizer_file,
        usage=Usage(bundle.template, bundle.aspect, bundle.prompt),
    )


def convert(
    checkpoint: Checkpoint,
    directory: str | os.PathLike[str],
    *,
    layout: str,
    dtype: str = "",
    max_shard_bytes: int = MAX_SHARD_BYTES,
    overwrite: bool = False,
    allow_nan: bool = False,
    progress: Callable[[int], object] | None = None,
) -> None:
    """Writes a model, tensor by tensor: no more than a few of them are in memory at a time.

    Args:
      checkpoint: a whole model.
      directory: appears when it is complete, or not at all.
      layout: `hf` (LLaVA for transformers), `share4v` (the original's) or `run` (Orbax, sharded:
        what training and everything else here loads).
      dtype: a key of `DTYPES`. By default every tensor keeps its own, but for a training run's,
        whose float32 masters become bfloat16.
      max_shard_bytes: the largest safetensors file.
      overwrite: whether to replace a directory that isn't empty.
      allow_nan: whether NaN and infinite weights pass.
      progress: called with the bytes of each tensor that was read.

    Raises:
      ConversionError: the checkpoint isn't whole, the layout has no such model, or weights are
        NaN or infinite. Lists everything that is wrong.
      FileExistsError: the directory isn't empty, and `overwrite` wasn't given.
      ValueError: unknown layout, dtype, template or aspect, or a tokenizer of another vocabulary.
      OSError: the disk is too small, or full.
    """
    if layout not in FORMATS:
        raise ValueError(f"format {layout!r} is not one of {FORMATS}")
    if dtype and dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    checkpoint = checkpoint.checked()
    if checkpoint.tokenizer_file is None and (checkpoint.path / "tokenizer.json").is_file():
        problem = "has tokenizer.json but no tokenizer.model, which transformers 5 does not save"
        raise ConversionError([f"{checkpoint.path} {problem}; copy that of the model it came from there"])
    if checkpoint.usage.history.get("step") and checkpoint.layout == "run":
        dtype = dtype or "bfloat16"
    if dtype:
        checkpoint = checkpoint.cast(DTYPES[dtype])
    dtype = checkpoint.dtype
    stream = Stream(progress, allow_not_finite=allow_nan)
    with new_directory(directory, overwrite=overwrite) as partial:
        _check_space(partial, checkpoint)
        if layout == "hf":
            huggingface.write_llava(partial, checkpoint, stream, dtype=dtype, max_shard_bytes=max_shard_bytes)
        elif layout == "share4v":
            share4v.write_share4v(partial, checkpoint, stream, dtype=dtype, max_shard_bytes=max_shard_bytes)
        else:
            orbax.write_run(partial, checkpoint, stream)
        if layout != "run":
            usage = dataclasses.asdict(checkpoint.usage)
            said = {key: value for key, value in usage.items() if key not in _IN_FORMAT[layout]}
            write_json(partial / USAGE, said)
        stream.finish()


def save_model(bundle: ModelBundle, directory: str | os.PathLike[str], **arguments: Any) -> None:
    """Writes a model in memory; see `convert`."""
    convert(as_checkpoint(bundle), directory, **arguments)


def _check_space(directory: pathlib.Path, checkpoint: Checkpoint) -> None:
    free = shutil.disk_usage(directory).free
    if checkpoint.nbytes > free:
        needed = f"{checkpoint.nbytes / 1e9:.1f} GB to write"
        raise OSError(f"{directory.parent}: {needed}, {free / 1e9:.1f} GB free")
