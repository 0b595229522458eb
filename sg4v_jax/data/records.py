"""Conversation records in LLaVA's JSON schema, the one ShareGPT4V publishes its data in.

    {"id": "000000000009", "image": "coco/train2017/000000000009.jpg",
     "conversations": [{"from": "human", "value": "<image>\\nWhat is this?"},
                       {"from": "gpt", "value": "A cat."}]}

A record without `image` is text only. Other keys (`model`, ...) are ignored.
"""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from etils import epath

from sg4v_jax.data.json_stream import Position, RecordError, read_entries

__all__ = [
    "IMAGE_PLACEHOLDER",
    "Record",
    "RecordError",
    "Turn",
    "image_names",
    "parse_record",
    "read_records",
    "resolve_image",
    "to_json",
]

IMAGE_PLACEHOLDER = "<image>"


@dataclasses.dataclass(frozen=True)
class Turn:
    """One side's words. `role` is "human" or "gpt", as in the files."""

    role: Literal["human", "gpt"]
    text: str


@dataclasses.dataclass(frozen=True)
class Record:
    """One conversation. The questions hold one `<image>` for each of `images`, in that order.

    A record without images may hold the text `<image>`; it means nothing there.
    """

    id: str
    images: tuple[str, ...]
    turns: tuple[Turn, ...]


def parse_record(obj: object, *, source: str, index: int | Position, answered: bool = True) -> Record:
    """Checks one decoded JSON object and makes it a `Record`.

    What ShareGPT4V's train.py does, and what differs here:
      * A first turn that is not by "human" is skipped, as there.
      * Turns must alternate, as there (an assertion). A conversation must also end with an answer;
        there it is kept and its whole loss masked.
      * Several `<image>` in one question, for a record with one image, become one, as there.
      * An image without any `<image>` is put at the front of the first question. There the image
        is left out of the sequence, silently.
      * Any other number of `<image>` is an error; there images shift to the wrong samples.
      * `<image>` in an answer is text. There it would take the next sample's image.

    Args:
        obj: what the JSON decoder gave.
        source: the file's name, for messages.
        index: the record's number in the file, from 0, or its position, for messages; the number is
            also the id of a record that has none.
        answered: False also takes a last question without an answer, as images to caption have.

    Raises:
        RecordError: the message names file, record, key, what was found and the fix; its `kind` is
            one of `data.defects.KINDS`.
    """
    where = f"{source}: {f'record {index}' if isinstance(index, int) else index}"
    if not isinstance(obj, Mapping):
        raise RecordError(f"{where}: expected a JSON object, found {_show(obj)}")
    id_ = obj.get("id", index if isinstance(index, int) else index.index)
    if not isinstance(id_, (str, int)) or isinstance(id_, bool):
        raise RecordError(f"{where}: 'id' is {_show(id_)}; make it a string")
    _check_text(str(id_), f"{where}: 'id'")
    where += f" (id {str(id_)!r})"
    images = _parse_images(obj, where)
    turns = _parse_turns(obj, where, answered)
    return Record(str(id_), images, _fit_placeholders(turns, len(images), where))


def image_names(obj: object) -> tuple[str, ...]:
    """The image paths of a decoded JSON object whose conversation may be bad; none if they are, too."""
    try:
        return _parse_images(obj, "") if isinstance(obj, Mapping) else ()
    except RecordError:
        return ()


def to_json(record: Record) -> dict[str, Any]:
    """Turns a record back into its JSON object; `parse_record` gives an equal record again."""
    obj: dict[str, Any] = {"id": record.id}
    if record.images:
        obj["image"] = record.images[0] if len(record.images) == 1 else list(record.images)
    obj["conversations"] = [{"from": turn.role, "value": turn.text} for turn in record.turns]
    return obj


def read_records(path: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    """Reads the objects of a JSON array or a JSONL file one by one.

    The file is never in memory as a whole; see `data.json_stream`, which also reads past mistakes.

    Raises:
        RecordError: at the first entry that is broken or no object, and at a file that is cut off;
            the message names file, record, line and byte.
    """
    for entry in read_entries(path):
        if entry.error:
            raise entry.error
        if not isinstance(entry.value, dict):
            raise RecordError(
                f"{os.fspath(path)}: {entry.position}: expected a JSON object, found {_show(entry.value)}"
            )
        yield entry.value


def resolve_image(root: str | os.PathLike[str], relative: str | os.PathLike[str]) -> epath.Path:
    """Finds a record's image below the image root. Does not check that the file exists.

    The root may be a URI (`gs://bucket/data`); object stores have no links to follow.

    Raises:
        RecordError: the path is absolute, or leaves the root by `..` or through a symbolic link.
    """
    refuse = functools.partial(RecordError, kind="path_outside")
    text = os.fspath(relative)
    pure = pathlib.PurePosixPath(text.replace("\\", "/"))
    if not text.strip() or "\0" in text:
        raise refuse(f"image path {text!r} is empty or holds a NUL; name a file")
    if pure.is_absolute() or pathlib.PureWindowsPath(text).drive or "://" in text:
        raise refuse(f"image path {text!r} is absolute; make it relative to the image root")
    if ".." in pure.parts:
        raise refuse(f"image path {text!r} holds '..'; name the file below the image root")
    if "://" in os.fspath(root):
        return epath.Path(root) / text
    base = pathlib.Path(root).resolve()
    try:
        path = (base / text).resolve()
    except (OSError, RuntimeError) as error:  # A link to itself.
        raise refuse(f"image path {text!r} can't be followed below {base}: {error}") from error
    if not path.is_relative_to(base):
        raise refuse(
            f"image path {text!r} leads out of the image root {base}, to {path}, through a "
            "symbolic link; move the files, mount them there, or choose a root that holds both"
        )
    return epath.Path(path)


def _parse_images(obj: Mapping[str, Any], where: str) -> tuple[str, ...]:
    if "image" not in obj:
        return ()
    value = obj["image"]
    names = [value] if isinstance(value, str) else value
    if (
        not isinstance(names, list)
        or not names
        or not all(isinstance(name, str) and name.strip() for name in names)
    ):
        raise RecordError(
            f"{where}: 'image' is {_show(value)}; give a path or a list of paths, or leave the key "
            "out of a text-only record"
        )
    for name in names:
        _check_text(name, f"{where}: 'image'")
    return tuple(names)


def _parse_turns(obj: Mapping[str, Any], where: str, answered: bool) -> tuple[Turn, ...]:
    entries = obj.get("conversations")
    if not isinstance(entries, list):
        raise RecordError(
            f"{where}: 'conversations' is {_show(entries) if entries is not None else 'missing'}; "
            "give a list of turns",
            "malformed_conversation",
        )
    turns = [_parse_turn(entry, f"{where}: conversations[{i}]") for i, entry in enumerate(entries)]
    skipped = 1 if turns and turns[0].role != "human" else 0
    turns = turns[skipped:]
    for i, turn in enumerate(turns):
        expected = ("human", "gpt")[i % 2]
        if turn.role != expected:
            raise RecordError(
                f"{where}: conversations[{i + skipped}]: 'from' is {turn.role!r}, expected "
                f"{expected!r}; turns must alternate: join or remove neighbours by the same side",
                "wrong_alternation",
            )
        if turn.role == "gpt" and not turn.text.strip():
            raise RecordError(
                f"{where}: conversations[{i + skipped}]: 'value' is empty; write the answer, or "
                "remove it and its question",
                "empty_answer",
            )
    if not turns or (answered and len(turns) % 2):
        raise RecordError(
            f"{where}: 'conversations' has {len(turns)} usable turns and must end with an answer; "
            "add the answer, or remove the last question",
            "no_answer",
        )
    return tuple(turns)


def _parse_turn(entry: object, where: str) -> Turn:
    if not isinstance(entry, Mapping):
        raise RecordError(
            f"{where}: expected an object with 'from' and 'value', {_show(entry)}", "malformed_conversation"
        )
    role, text = entry.get("from"), entry.get("value")
    if role not in ("human", "gpt"):
        raise RecordError(f"{where}: 'from' is {_show(role)}; use 'human' or 'gpt'", "malformed_conversation")
    if not isinstance(text, str):
        raise RecordError(f"{where}: 'value' is {_show(text)}; make it a string", "malformed_conversation")
    _check_text(text, f"{where}: 'value'")
    return Turn(role, text)


def _check_text(text: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RecordError(
            f"{where} holds half of a surrogate pair at character {error.start}; replace it (a broken "
            "\\ud83d-style escape)",
            "broken_text",
        ) from error


def _fit_placeholders(turns: tuple[Turn, ...], images: int, where: str) -> tuple[Turn, ...]:
    """Makes the number of placeholders in the questions equal the number of images, or raises."""
    counts = [t.text.count(IMAGE_PLACEHOLDER) if t.role == "human" else 0 for t in turns]
    found = sum(counts)
    if images == 0 or found == images:
        fitted = turns
    elif found == 0:
        lines = f"{IMAGE_PLACEHOLDER}\n" * images
        fitted = (dataclasses.replace(turns[0], text=lines + turns[0].text), *turns[1:])
    elif images == 1 and found == max(counts):
        at = counts.index(found)
        text = turns[at].text
        head, _, tail = text.partition(IMAGE_PLACEHOLDER)
        text = head + IMAGE_PLACEHOLDER + tail.replace(IMAGE_PLACEHOLDER, "")
        fitted = (*turns[:at], dataclasses.replace(turns[at], text=text), *turns[at + 1 :])
    else:
        raise RecordError(
            f"{where}: 'image' names {images} image(s), the questions hold {found} "
            f"{IMAGE_PLACEHOLDER}; write one {IMAGE_PLACEHOLDER} for each image",
            "image_count",
        )
    for i, turn in enumerate(fitted):
        if not turn.text.strip():
            message = f"{where}: question {i // 2} is empty; write it, or remove it and its answer"
            raise RecordError(message, "empty_question")
    return fitted


def _show(value: object) -> str:
    text = ascii(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"
