"""Models written to and read from directories in one line, as the tests of conversion need it."""

import pathlib
from typing import Any

from sg4v_jax.convert.bundle import ModelBundle
from sg4v_jax.convert.load import load_model, save_model
from sg4v_jax.models.config import ModelConfig


def load(path: pathlib.Path, **parts: Any) -> tuple[ModelConfig, dict[str, Any]]:
    """(config, params) of a model directory."""
    bundle = load_model(path, **parts)
    return bundle.config, bundle.params


def save(
    directory: pathlib.Path,
    config: ModelConfig,
    params: dict[str, Any],
    layout: str,
    *,
    tokenizer_file: pathlib.Path | None = None,
    template: str = "v1",
    aspect: str = "pad",
    **arguments: Any,
) -> None:
    """Writes a model."""
    bundle = ModelBundle(config, params, tokenizer_file, template, aspect)
    save_model(bundle, directory, layout=layout, **arguments)
