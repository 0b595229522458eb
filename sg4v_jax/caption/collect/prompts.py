"""What to ask about an image: an opener, a part that depends on where it comes from, a closer.

The structure is the paper's (spec 1.7); its texts were never published, and these are our own.
"""

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

OPENER = "You are an expert at describing images in words, and you miss nothing that matters."
CLOSER = (
    "Keep to three rules. Describe only what you can make out with confidence, and leave out what you "
    "would have to guess or imagine. Write flowing prose, without bullet points, numbering, headings or "
    "other markup. Say as little as possible about mood, beauty or artistic quality."
)
_NATURAL = (
    "Write a detailed caption of the image. Name the kinds of objects and their colours, count them, say "
    "what they do and exactly where they are, and quote any text that can be read. Before you answer, "
    "check the relative positions of the objects once more."
)
SOURCES = {
    "coco": _NATURAL,
    "lcs": _NATURAL,
    "sam": _NATURAL,
    "text": (
        "Write a detailed caption of the image. Pay particular attention to the text in it: quote it, say "
        "where it stands and what it stands on, and explain what it tells the reader."
    ),
    "celebrity": (
        "The image shows a person known to the public. Write a detailed caption that says who it is and, "
        "if it is a scene from a film or show, which role is played, and describe what the person does, "
        "wears and expresses, and the surroundings."
    ),
    "landmark": (
        "The image shows a landmark. Write a detailed caption that names it, says where in the world it "
        "stands, describes what can be seen of it and around it, and adds what is generally known about it."
    ),
    "wikiart": (
        "The image shows a work of art. Write a detailed caption of what is depicted and how the picture is "
        "composed, and name the work and its artist if you recognise them, its style and its genre."
    ),
    "web": _NATURAL,
}
# The folders of ShareGPT4V's own data (spec 1.3).
ROUTES = {
    "coco": "coco",
    "llava/llava_pretrain": "lcs",
    "sam": "sam",
    "share_textvqa": "text",
    "textvqa": "text",
    "ocr_vqa": "text",
    "web-celebrity": "celebrity",
    "web-landmark": "landmark",
    "wikiart": "wikiart",
    "": "web",
}
# The released file asks short, generic questions, not those above (spec 1.2): a model is trained on these.
QUESTIONS = (
    "Describe this image in detail.",
    "What does this image show?",
    "Give a detailed account of what can be seen here.",
    "Can you describe the contents of the picture?",
    "What is happening in the image?",
    "Write a thorough caption for this image.",
    "Tell me everything you see in this picture.",
    "Explain what is in the image, and where.",
)


@dataclasses.dataclass(frozen=True)
class Prompts:
    """The texts, and which image gets which.

    Attributes:
      opener: how every prompt begins.
      closer: how every prompt ends.
      sources: source -> its own part.
      routes: folder -> source; the longest folder that holds an image counts, "" holds all.
      prose: the closer forbids lists and markup, so an answer with them is refused.
    """

    opener: str = OPENER
    closer: str = CLOSER
    sources: Mapping[str, str] = dataclasses.field(default_factory=lambda: dict(SOURCES))
    routes: Mapping[str, str] = dataclasses.field(default_factory=lambda: dict(ROUTES))
    prose: bool = True

    def __post_init__(self) -> None:
        for folder, source in self.routes.items():
            if source not in self.sources:
                raise ValueError(
                    f"{folder!r} is mapped to source {source!r}, which is {_one_of(self.sources)}"
                )

    def source(self, path: str) -> str:
        """The source of an image.

        Raises:
          ValueError: no folder of the map holds it.
        """
        parts = pathlib.PurePosixPath(path).parts
        for length in range(len(parts) - 1, -1, -1):
            folder = "/".join(parts[:length])
            if folder in self.routes:
                return self.routes[folder]
        raise ValueError(f'{path}: no folder of the source map holds it; map "" to a source for all others')

    def text(self, source: str) -> str:
        """The whole prompt for images of a source."""
        return "\n".join(part for part in (self.opener, self.sources[source], self.closer) if part)


def load_prompts(
    prompts: str | os.PathLike[str] | None, source_map: str | os.PathLike[str] | None
) -> Prompts:
    """Our prompts, or a user's.

    Args:
      prompts: a JSON file `{"opener": ..., "closer": ..., "sources": {NAME: TEXT}, "prose": true}`; keys
        that it leaves out, and sources that it doesn't name, stay as they are here.
      source_map: a JSON file `{FOLDER: SOURCE}` that adds to `ROUTES` and goes before it.

    Raises:
      ValueError: a file isn't JSON, or has a key, a value or a source that isn't known.
    """
    fields: dict[str, Any] = {}
    if prompts:
        fields = _object(prompts)
        for name, value in fields.items():
            expected = {"opener": str, "closer": str, "sources": dict, "prose": bool}
            if name not in expected:
                raise ValueError(f"{prompts}: key {name!r} is {_one_of(expected)}")
            if not isinstance(value, expected[name]):
                raise ValueError(f"{prompts}: {name!r} must be of type {expected[name].__name__}")
        fields["sources"] = {**SOURCES, **_texts(prompts, fields.get("sources", {}))}
    if source_map:
        routes = _texts(source_map, _object(source_map))
        fields["routes"] = {**ROUTES, **{folder.strip("/"): source for folder, source in routes.items()}}
    try:
        return Prompts(**fields)
    except ValueError as error:
        raise ValueError(f"{source_map}: {error}") from error


@functools.cache
def prompt_sha256(prompt: str) -> str:
    """What a prompt is known by in the results."""
    return hashlib.sha256(prompt.encode()).hexdigest()


def question_for(image_sha256: str) -> str:
    """One of `QUESTIONS`, always the same for an image."""
    return QUESTIONS[int(image_sha256[:8], 16) % len(QUESTIONS)]


def _object(path: str | os.PathLike[str]) -> dict[str, Any]:
    try:
        found = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not a JSON file: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: expected a JSON object")
    return found


def _texts(path: str | os.PathLike[str], found: dict[str, Any]) -> dict[str, str]:
    for name, text in found.items():
        if not isinstance(text, str) or not text:
            raise ValueError(f"{path}: {name!r} must be a text that is not empty")
    return found


def _one_of(names: Mapping[str, Any]) -> str:
    return f"not one of {', '.join(names)}"
