"""A conversation in the terminal."""

import pathlib
import sys
from collections.abc import Sequence

from sg4v_jax.data.records import IMAGE_PLACEHOLDER, Turn
from sg4v_jax.infer.generate import Generator, Prompt
from sg4v_jax.infer.sampling import SamplingOptions


def chat(generator: Generator, images: Sequence[str], question: str | None, options: SamplingOptions) -> None:
    """Prints answers as they are decoded.

    Args:
      generator: the model.
      images: image files, shown with the first question.
      question: one question; None reads them from standard input until it ends.
      options: how to generate.
    """
    encoded = tuple(pathlib.Path(path).read_bytes() for path in images)
    if question is not None:
        _answer(generator, (_first(question, len(encoded)),), encoded, options)
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
        turns += (Turn("gpt", _answer(generator, turns, encoded, options) or " "),)


def _first(question: str, num_images: int) -> Turn:
    return Turn("human", f"{IMAGE_PLACEHOLDER}\n" * num_images + question)


def _answer(
    generator: Generator, turns: tuple[Turn, ...], images: tuple[bytes, ...], options: SamplingOptions
) -> str:
    pieces = []
    for piece in generator.stream(Prompt(turns, images), options):
        print(piece, end="", flush=True)
        pieces.append(piece)
    print()
    return "".join(pieces)
