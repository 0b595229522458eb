"""A conversation in the terminal."""

import pathlib
import sys
from collections.abc import Sequence

from sg4v_jax.data.records import IMAGE_PLACEHOLDER, Turn
from sg4v_jax.infer.engine import Engine
from sg4v_jax.infer.request import Prompt
from sg4v_jax.infer.sampling import SamplingOptions


def chat(engine: Engine, images: Sequence[str], question: str | None, options: SamplingOptions) -> None:
    """Prints answers as they are decoded.

    Args:
      engine: the model.
      images: image files, shown with the first question.
      question: one question; None reads them from standard input until it ends.
      options: how to generate.
    """
    encoded = tuple(pathlib.Path(path).read_bytes() for path in images)
    if question is not None:
        _answer(engine, (_first(question, len(encoded)),), encoded, options)
        return
    print("Ask about the image. An empty line starts over, Ctrl-D ends.", file=sys.stderr)
    turns: tuple[Turn, ...] = ()
    while True:
        try:
            text = input("> ").strip()
        except EOFError:
            return
        if not text:
            turns = ()
            continue
        turns += (_first(text, len(encoded)) if not turns else Turn("human", text),)
        turns += (Turn("gpt", _answer(engine, turns, encoded, options) or " "),)


def _first(question: str, num_images: int) -> Turn:
    return Turn("human", f"{IMAGE_PLACEHOLDER}\n" * num_images + question)


def _answer(
    engine: Engine, turns: tuple[Turn, ...], images: tuple[bytes, ...], options: SamplingOptions
) -> str:
    pieces = []
    for piece in engine.stream(Prompt(turns, images), options):
        print(piece, end="", flush=True)
        pieces.append(piece)
    print()
    return "".join(pieces)
