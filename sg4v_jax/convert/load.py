"""Any model directory in, any format out."""

import os
import pathlib

import jax

from sg4v_jax.convert import huggingface, orbax, share4v
from sg4v_jax.convert.bundle import ModelBundle
from sg4v_jax.convert.files import read_json, write_json
from sg4v_jax.models.sharegpt4v import resplit_vision

FORMATS = ("hf", "share4v")
# Neither format says how a model was trained to be prompted; a small file of our own beside it does.
USAGE = "sg4v.json"


def load_model(directory: str | os.PathLike[str]) -> ModelBundle:
    """Loads a model from a training run, an HF LLaVA directory or an original share4v directory.

    Raises:
      FileNotFoundError: if `directory` is none of them.
      ConversionError: if its weights don't fit its config.
    """
    directory = pathlib.Path(directory)
    if orbax.is_run(directory):
        return orbax.load_run(directory)
    if not (directory / "config.json").is_file():
        raise FileNotFoundError(
            f"{directory} is no model: it has neither {orbax.CHECKPOINTS}/ (a training run of this "
            "library) nor config.json (Hugging Face LLaVA, or original share4v)"
        )
    if read_json(directory / "config.json").get("text_config"):
        config, params = huggingface.load_llava(directory)
    else:
        config, params = share4v.load_share4v(directory)
    tokenizer = directory / "tokenizer.model"
    usage = read_json(directory / USAGE) if (directory / USAGE).is_file() else {}
    return ModelBundle(config, params, tokenizer if tokenizer.exists() else None, **usage)


def save_model(
    bundle: ModelBundle,
    directory: str | os.PathLike[str],
    *,
    layout: str,
    dtype: str = "bfloat16",
    overwrite: bool = False,
) -> None:
    """Writes a model as `hf` (LLaVA for transformers) or `share4v` (the original's layout).

    Raises:
      ValueError: on an unknown layout or dtype.
      FileExistsError: if the directory isn't empty and `overwrite` wasn't given.
    """
    # Files know nothing of the split; one stack needs no special case in the tables.
    config = bundle.config.with_tuned_from(0)
    params = jax.device_get(resplit_vision(bundle.params, 0))
    if layout == "hf":
        huggingface.save_llava(
            directory,
            config,
            params,
            tokenizer_file=bundle.tokenizer_file,
            dtype=dtype,
            template=bundle.template,
            aspect=bundle.aspect,
            overwrite=overwrite,
        )
    elif layout == "share4v":
        share4v.save_share4v(
            directory,
            config,
            params,
            tokenizer_file=bundle.tokenizer_file,
            dtype=dtype,
            aspect=bundle.aspect,
            overwrite=overwrite,
        )
    else:
        raise ValueError(f"format {layout!r} is not one of {FORMATS}")
    usage = {"template": bundle.template, "aspect": bundle.aspect, "prompt": bundle.prompt}
    write_json(pathlib.Path(directory) / USAGE, usage)
