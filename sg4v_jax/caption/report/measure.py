"""The numbers of one caption, and of a million: a row of a table for each, about 60 bytes."""

import collections
import dataclasses
import hashlib
import os
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from sg4v_jax.caption import flaws
from sg4v_jax.caption.collect.filters import refuses
from sg4v_jax.caption.report.captions import Caption, Skipped, caption_files, read_captions
from sg4v_jax.caption.report.phrases import KINDS, count_phrases, tokenize
from sg4v_jax.data.sources import release_of, source_of

# The end of a sentence: a mark, and quotes or brackets after it.
_END = re.compile(r"[.!?…。！？]+[\"”'’)\]*]*(?=\s|$)")
_BLOCK = 4096

FLAGS = {
    "empty": "no text",
    "refusal": "begins like a refusal or an apology",
    "cut off": "the file says that it was not finished",
    "open end": "does not end with the end of a sentence",
    "repetition": f"the same words {flaws.TIMES} times or more back to back ({flaws.LEAST} words or more), "
    f"or a sentence of {flaws.SENTENCE_WORDS} words or more {flaws.SENTENCE_TIMES} times",
}
COLUMNS = np.dtype(
    [
        ("image", "u8"),  # hash of the path
        ("text", "u8"),  # hash of the caption
        ("source", "u4"),
        ("characters", "u4"),
        ("words", "u4"),
        ("sentences", "u4"),
        ("trigrams", "u4"),
        ("repeated", "u4"),  # trigrams that were in the same caption before
        *((kind, "u2") for kind in KINDS),
        *((flag, "?") for flag in FLAGS),
    ]
)


@dataclasses.dataclass
class CaptionSet:
    """What is known of a set of captions.

    Attributes:
      name: for people.
      files: where it was read from.
      table: a row of `COLUMNS` for every caption, in the order of the files.
      sources: names of the sources, which `table["source"]` counts from 0.
      expected: captions by source that a published file of this name has; empty for others.
      skipped: what holds no caption.
      states_finished: captions whose file says whether they were finished.
    """

    name: str
    files: tuple[str, ...]
    table: np.ndarray
    sources: tuple[str, ...]
    expected: dict[str, int]
    skipped: Skipped
    states_finished: int

    def __len__(self) -> int:
        return len(self.table)

    def first_of_image(self) -> np.ndarray:
        """int[images]: the row of each image's first caption, in the order of the images' hashes."""
        rows: np.ndarray = np.unique(self.table["image"], return_index=True)[1]
        return rows


def measure(
    paths: Sequence[str | os.PathLike[str]],
    name: str = "",
    *,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> CaptionSet:
    """Measures all captions of some files in one pass.

    Args:
      paths: files, or folders with one (see `captions.read_captions`).
      name: for people; the first path by default.
      progress: wraps the iteration over captions.

    Raises:
      ValueError: there is no caption in them.
    """
    files = tuple(map(os.fspath, caption_files(paths)))
    expected: collections.Counter[str] = collections.Counter()
    blocks, rows, skipped, states = [], [], Skipped(), 0
    sources: dict[str, int] = {}
    for file in files:
        release = release_of(file)
        expected.update(release.counts if release else {})
        for caption in progress(read_captions([file], skipped)):
            source = sources.setdefault(source_of(caption.image, release), len(sources))
            rows.append((hash_text(caption.image), hash_text(caption.text), source, *numbers(caption)))
            states += caption.finished is not None
            if len(rows) == _BLOCK:
                blocks.append(np.array(rows, COLUMNS))
                rows.clear()
    blocks.append(np.array(rows, COLUMNS))
    table = np.concatenate(blocks)
    if not len(table):
        reasons = ", ".join(f"{count} {reason}" for reason, count in skipped.counts.items()) or "no entries"
        raise ValueError(f"{', '.join(files)}: no captions in it ({reasons})")
    name = name or os.fspath(paths[0])
    return CaptionSet(name, files, table, tuple(sources), dict(expected), skipped, states)


def numbers(caption: Caption) -> tuple[int, ...]:
    """The columns of a caption from `characters` on."""
    text = caption.text
    tokens = tokenize(text)
    sentences = _END.split(text)
    if not sentences[-1].strip():
        sentences.pop()
    trigrams = list(zip(tokens, tokens[1:], tokens[2:], strict=False))
    flags = {
        "empty": not text,
        "refusal": refuses(text),
        "cut off": caption.finished is False,
        "open end": bool(text) and not flaws.ends_whole(text),
        "repetition": flaws.repeats(text, tokens),
    }
    return (
        len(text),
        len(text.split()),
        len(sentences),
        len(trigrams),
        len(trigrams) - len(set(trigrams)),
        *(min(count, 65535) for count in count_phrases(text, tokens)),
        *(flags[name] for name in FLAGS),
    )


def hash_text(text: str) -> int:
    """64 bits that stand for a text."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
