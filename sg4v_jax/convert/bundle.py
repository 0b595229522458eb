"""What a model directory holds, in whichever format."""

import dataclasses
import pathlib
from typing import Any

from sg4v_jax.models.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class ModelBundle:
    """A model with all that is needed to use it.

    Attributes:
      config: its shapes.
      params: its parameters as a nested dict, in the layout that `config` asks for.
      tokenizer_file: SentencePiece model, None if the directory holds none.
      template: conversation template it was trained with.
      aspect: image preprocessing it was trained with.
      prompt: the one prompt a captioner was trained with; empty otherwise.
    """

    config: ModelConfig
    params: dict[str, Any]
    tokenizer_file: pathlib.Path | None
    template: str = "v1"
    aspect: str = "pad"
    prompt: str = ""
