"""A model on disk, in whichever format: what it is and where its tensors are. Nothing is read yet."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from sg4v_jax.convert.params import check
from sg4v_jax.convert.tensors import ConversionError, Tensor
from sg4v_jax.models.config import ModelConfig, TextConfig, VisionConfig

# The parts of a model, and what the canonical keys of their tensors start with.
PARTS = {"vision": "vision_tower.", "projector": "multi_modal_projector.", "text": "language_model."}


@dataclasses.dataclass(frozen=True)
class Usage:
    """How a model wants to be used, which no format but ours (`sg4v.json`) keeps whole.

    Attributes:
      template: conversation template it was trained with.
      aspect: image preprocessing it was trained with.
      prompt: the one prompt a captioner was trained with; empty otherwise.
      chat_template: Jinja text of an HF directory that says something else than `template`.
      generation: fields of generation_config.json, beside the ids that every format has of its own.
      history: where it comes from: `step` of training, `tuned` parameter groups.
    """

    template: str = "v1"
    aspect: str = "pad"
    prompt: str = ""
    chat_template: str = ""
    generation: dict[str, Any] = dataclasses.field(default_factory=dict)
    history: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A model, or parts of one, whose tensors are not read yet.

    Attributes:
      path: the directory or file it was opened from.
      layout: `run`, `hf`, `share4v`, `llama`, `clip`, `projector`, `lora` or `memory`.
      tensors: by canonical key (see `convert.names`), with the shapes of the files.
      vision, text: shapes of the towers; None for a part that isn't there.
      projector: kind of the projector; None if there is none.
      features: (select_layer, select_feature), where the image features are taken from.
      tokenizer_file: SentencePiece model, None if there is none.
      usage: see `Usage`.
    """

    path: pathlib.Path
    layout: str
    tensors: Mapping[str, Tensor]
    vision: VisionConfig | None = None
    text: TextConfig | None = None
    projector: str | None = None
    features: tuple[int, str] = (-2, "patch")
    tokenizer_file: pathlib.Path | None = None
    usage: Usage = dataclasses.field(default_factory=Usage)

    @property
    def parts(self) -> tuple[str, ...]:
        """Those of `PARTS` that are there."""
        return tuple(part for part in PARTS if getattr(self, part) is not None)

    @property
    def config(self) -> ModelConfig:
        """The whole model's shapes.

        Raises:
          ConversionError: parts are missing.
        """
        if self.vision is None or self.text is None or self.projector is None:
            raise ConversionError(
                [f"{self.path}: {_LACKS[part]}" for part in PARTS if part not in self.parts]
            )
        layer, feature = self.features
        vision = dataclasses.replace(self.vision, select_layer=layer, select_feature=feature)
        return ModelConfig(vision, self.text, self.projector)

    @property
    def nbytes(self) -> int:
        """Size of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def dtype(self) -> str:
        """The dtype of most of it."""
        sizes: dict[str, int] = {}
        for tensor in self.tensors.values():
            sizes[tensor.dtype.name] = sizes.get(tensor.dtype.name, 0) + tensor.nbytes
        return max(sizes, key=lambda name: sizes[name])

    def cast(self, dtype: np.dtype) -> "Checkpoint":
        """The same in another dtype."""
        tensors = {key: tensor.cast(dtype) for key, tensor in self.tensors.items()}
        return dataclasses.replace(self, tensors=tensors)

    def part(self, name: str) -> dict[str, Tensor]:
        """The tensors of one of `PARTS`."""
        return {key: tensor for key, tensor in self.tensors.items() if key.startswith(PARTS[name])}

    def with_part(self, name: str, other: "Checkpoint") -> "Checkpoint":
        """This checkpoint with one part of another in the place of its own.

        Raises:
          ConversionError: the other has no such part.
        """
        if name not in other.parts:
            raise ConversionError([f"{other.path}: {_LACKS[name]}"])
        rest = {key: tensor for key, tensor in self.tensors.items() if not key.startswith(PARTS[name])}
        changes: dict[str, Any] = {name: getattr(other, name)}
        return dataclasses.replace(self, tensors={**rest, **other.part(name)}, **changes)

    def checked(self) -> "Checkpoint":
        """This checkpoint, if it is a whole model.

        Raises:
          ConversionError: with every missing part, and every missing, unexpected or misshapen tensor.
        """
        if problems := check(self.config, self.tensors):
            raise ConversionError([f"{self.path} does not fit its config:", *problems])
        return self


_LACKS = {
    "vision": "no vision tower there; fetch it (the original keeps it in a repository of its own) and "
    "give its directory as --vision-tower",
    "projector": "no projector there; give its file (mm_projector.bin) as --projector, or "
    "--projector random for an untrained one",
    "text": "no decoder there",
}
