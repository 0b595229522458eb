"""A captioner without a model: its captions depend on the request alone, and come in any order."""

import dataclasses
import hashlib
import io
import itertools
import pathlib
import time
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from PIL import Image

from sg4v_jax.caption.corpus.guards import Guards
from sg4v_jax.caption.corpus.inputs import open_corpus
from sg4v_jax.caption.corpus.job import Settings
from sg4v_jax.caption.corpus.outputs import Summary
from sg4v_jax.caption.corpus.run import caption_corpus
from sg4v_jax.infer.request import Completion, Request, Result

PROMPT = "What is it?"
MODEL = {"sha256": "of the fake"}
WORDS = (
    "a",
    "red",
    "green",
    "blue",
    "small",
    "large",
    "cat",
    "dog",
    "stands",
    "beside",
    "the",
    "over\u2028there",
)


class FakeEngine:
    """Slots that take requests in turn; each answer takes as many steps as it has words.

    Attributes:
      asked: all requests so far.
    """

    def __init__(self, slots: int = 4, seconds: float = 0.0):
        self.slots, self.seconds = slots, seconds
        self.asked: list[Request] = []

    def complete(self, requests: Iterable[Request]) -> Iterator[Result]:
        pulled, running = iter(requests), list[list[Any]]()
        while True:
            for request in itertools.islice(pulled, self.slots - len(running)):
                self.asked.append(request)
                answer = caption_for(request)
                running.append([len(answer.completion.tokens) if answer.completion else 0, answer])
            if not running:
                return
            time.sleep(self.seconds)
            for slot in running:
                slot[0] -= 6
            yield from [answer for left, answer in running if left <= 0]
            running = [slot for slot in running if slot[0] > 0]


def caption_for(request: Request) -> Result:
    """What the fake says; images of one colour make it fall into a loop, dark ones never end."""
    (data,) = request.prompt.images
    try:
        pixels = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    except OSError as error:
        return Result(request.key, None, f"image 0 of the prompt: {error}")
    if pixels.max() == 1:
        return Result(request.key, None, "too long")
    options = dataclasses.asdict(request.options)
    digest = hashlib.sha256(data + repr((options, request.prompt.turns)).encode()).digest()
    words = [WORDS[byte % len(WORDS)] for byte in digest[: 4 + digest[0] % 24]]
    end = "."
    hot = request.options.temperature > 0
    if not np.ptp(pixels):
        if not (hot and request.options.repetition_penalty > 1):
            words = words[:2] * 20
        if pixels.max() < 64 and request.options.max_new_tokens < 200:
            end = ""
    tokens = tuple(WORDS.index(word) for word in words)
    text = " ".join(words) + end
    return Result(
        request.key, Completion(text, tokens, bool(end), -digest[1] / 7, "end" if end else "length"), ""
    )


def caption(
    source: Any, output: Any, engine: FakeEngine | None = None, root: Any = None, **fields: Any
) -> Summary:
    """Captions a corpus with the fake."""
    settings = Settings(**{"shard_size": 7, "max_failed": "50%"} | fields)
    corpus = open_corpus(source, root)
    return caption_corpus(engine or FakeEngine(), corpus, output, settings, prompt=PROMPT, model=MODEL)


def write_images(root: pathlib.Path, count: int) -> list[str]:
    """Draws small images, some of them not usable; their paths in the order of the corpus."""
    rng = np.random.default_rng(0)
    for number in range(count):
        path = root / f"{'abc'[number % 3]}/{number:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (4, 4, 3), np.uint8)
        if number % 17 == 3:
            pixels[:] = 200
        Image.fromarray(pixels).save(path, compress_level=1)
        if number % 23 == 5:
            data = path.read_bytes()
            path.write_bytes(data[: data.index(b"IDAT") + 9])  # Its header is whole.
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*.png"))


def main(source: str, output: str, seconds: float, **fields: Any) -> None:
    """For a process of its own."""
    caption(source, output, FakeEngine(seconds=seconds), guards=Guards(retry=1), **fields)
