"""Caption files of every kind as one stream: LLaVA-format JSON, and what `caption` and `collect` write."""

import collections
import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from etils import epath

from sg4v_jax.data.json_stream import read_entries
from sg4v_jax.data.records import image_names

# In a folder, what knows most about its captions: the first of these that is there.
FILES = ("shards/captions-*.jsonl", "captions.jsonl", "captions.json", "results.jsonl")


@dataclasses.dataclass(frozen=True, slots=True)
class Caption:
    """One caption.

    Attributes:
      image: path relative to the image root.
      text: without space around it.
      finished: whether the captioner ended it; None if the file doesn't say.
    """

    image: str
    text: str
    finished: bool | None = None


@dataclasses.dataclass
class Skipped:
    """Entries that hold no caption: how many, by reason, and the first of each."""

    counts: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    examples: dict[str, str] = dataclasses.field(default_factory=dict)

    def add(self, reason: str, example: str) -> None:
        """Counts one."""
        self.counts[reason] += 1
        self.examples.setdefault(reason, example)


def caption_files(paths: Sequence[str | os.PathLike[str]]) -> list[epath.Path]:
    """The files to read: a folder stands for the first of `FILES` in it.

    Raises:
      FileNotFoundError: a path is not there, or a folder without such a file.
    """
    files: list[epath.Path] = []
    for path in map(epath.Path, paths):
        if path.is_dir():
            found = next(filter(None, (sorted(path.glob(name)) for name in FILES)), [])
            if not found:
                raise FileNotFoundError(f"{path}: holds none of {', '.join(FILES)}; name the caption file")
            files += found
        elif path.exists():
            files.append(path)
        else:
            raise FileNotFoundError(f"{path}: no such file; give a caption file, or a folder with one")
    return files


def read_captions(
    paths: Sequence[str | os.PathLike[str]], skipped: Skipped | None = None
) -> Iterator[Caption]:
    """Reads captions one by one; the memory does not grow with the files.

    An entry is one of:
      * a LLaVA record: the caption is its first answer;
      * a line with `image`, `caption` and perhaps `finished`, as `sg4v caption` writes;
      * a line of `results.jsonl`, as `sg4v collect` writes: accepted answers are captions.

    Args:
      paths: files, or folders with one.
      skipped: where to count what holds no caption.

    Raises:
      FileNotFoundError: as `caption_files`.
      RecordError: a file is no JSON array or JSONL, or is cut off.
    """
    skipped = Skipped() if skipped is None else skipped
    for path in caption_files(paths):
        for entry in read_entries(path):
            if entry.error:
                skipped.add("broken", str(entry.error))
                continue
            caption = _caption(entry.value)
            if isinstance(caption, Caption):
                yield caption
            elif caption:
                skipped.add(caption, f"{path}: {entry.position}")


def _caption(value: object) -> Caption | str:
    """A caption, or why there is none; "" is nothing to count."""
    if not isinstance(value, Mapping):
        return "no object"
    if "event" in value:
        if value["event"] != "answer":
            return ""
        if value.get("verdict") != "accepted":
            return f"answer rejected: {value.get('verdict')}"
    images = image_names(value)
    if not images:
        return "no image"
    if "conversations" in value:
        text = _first_answer(value["conversations"])
    elif "error" in value and "caption" not in value:
        return "error"
    else:
        text = value.get("caption")
    if not isinstance(text, str):
        return "no caption"
    finished = value.get("finished")
    return Caption(images[0], _valid(text).strip(), finished if isinstance(finished, bool) else None)


def _first_answer(turns: Any) -> Any:
    if not isinstance(turns, list):
        return None
    answers = (turn.get("value") for turn in turns if isinstance(turn, Mapping) and turn.get("from") == "gpt")
    return next(answers, None)


def _valid(text: str) -> str:
    """The text as UTF-8 can hold it: halves of surrogate pairs are replaced."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
