"""The four real photographs that come with the world, described by hand."""

from __future__ import annotations

import dataclasses
import importlib.resources
import json

from sg4v_jax.world.describe import QA, SHORT_ANSWER


@dataclasses.dataclass(frozen=True)
class Photo:
    """A photograph with what was written about it.

    Attributes:
      name: File name, for example "coffee.jpg".
      caption: A dense caption.
      questions: Short-answer questions, in the form of those about scenes.
      encoded: The bytes of the image file; `photos/LICENSES.md` gives their origin.
    """

    name: str
    caption: str
    questions: tuple[QA, ...]
    encoded: bytes = dataclasses.field(repr=False)


def load_photos() -> tuple[Photo, ...]:
    """Reads the photographs from the package.

    Returns:
      The four photos, in alphabetical order. All are CC0 or in the public domain.
    """
    folder = importlib.resources.files("sg4v_jax.world") / "photos"
    entries = json.loads((folder / "photos.json").read_text(encoding="utf-8"))
    return tuple(
        Photo(
            name=entry["image"],
            caption=entry["caption"],
            questions=tuple(
                QA(turn["question"] + SHORT_ANSWER, turn["answer"], turn["category"])
                for turn in entry["questions"]
            ),
            encoded=(folder / entry["image"]).read_bytes(),
        )
        for entry in entries
    )
