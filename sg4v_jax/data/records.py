"""Conversation records in LLaVA's JSON schema, the one ShareGPT4V publishes its data in.

    {"id": "000000000009", "image": "coco/train2017/000000000009.jpg",
     "conversations": [{"from": "human", "value": "<image>\\nWhat is this?"},
                       {"from": "gpt", "value": "A cat."}]}

A record without `image` is text only. Other keys (`model`, ...) are ignored.
"""

import dataclasses
import json
import os
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal, TextIO

IMAGE_PLACEHOLDER = "<image>"

_CHUNK = 1 << 20
_LARGEST_RECORD = 1 << 26
_SPACE = re.compile(r"[ \t\n\r]*")


class RecordError(ValueError):
    """A data file or one of its records can't be used; the message says where, what and the fix."""


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


def parse_record(obj: object, *, source: str, index: int) -> Record:
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
        index: the record's number in the file, from 0, for messages; also the id of a record that
            has none.

    Raises:
        RecordError: the message names file, record, key, what was found and the fix.
    """
    where = f"{source}: record {index}"
    if not isinstance(obj, Mapping):
        raise RecordError(f"{where}: expected a JSON object, found {_show(obj)}")
    id_ = obj.get("id", index)
    if not isinstance(id_, (str, int)) or isinstance(id_, bool):
        raise RecordError(f"{where}: 'id' is {_show(id_)}; make it a string")
    where += f" (id {str(id_)!r})"
    images = _parse_images(obj, where)
    turns = _parse_turns(obj, where)
    return Record(str(id_), images, _fit_placeholders(turns, len(images), where))


def to_json(record: Record) -> dict[str, Any]:
    """Turns a record back into its JSON object; `parse_record` gives an equal record again."""
    obj: dict[str, Any] = {"id": record.id}
    if record.images:
        obj["image"] = record.images[0] if len(record.images) == 1 else list(record.images)
    obj["conversations"] = [{"from": turn.role, "value": turn.text} for turn in record.turns]
    return obj


def read_records(path: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    """Reads the objects of a JSON array or a JSONL file one by one.

    The file is never in memory as a whole: a chunk of text and one object at a time are.

    Raises:
        RecordError: not UTF-8, not JSON, cut off, or an entry that is no object; the message names
            file, record, line and (in an array) the character offset.
    """
    # Universal newlines stay on: no JSON string holds a raw line break, and lines count right.
    with open(path, encoding="utf-8-sig") as file:
        try:
            first = _first_character(file)
            file.seek(0)
            if first == "[":
                yield from _ArrayReader(file, os.fspath(path)).objects()
            elif first == "{":
                yield from _read_lines(file, os.fspath(path))
            else:
                found = f"starts with {first!r}" if first else "is empty"
                raise RecordError(
                    f"{os.fspath(path)}: the file {found}; expected a JSON array of records ('[') "
                    "or one JSON object on each line ('{')"
                )
        except UnicodeDecodeError as error:
            raise RecordError(
                f"{os.fspath(path)}: not UTF-8 text ({error.reason}); is it compressed, or an "
                "image? Unpack it, or save it as UTF-8"
            ) from error


def resolve_image(root: str | os.PathLike[str], relative: str | os.PathLike[str]) -> pathlib.Path:
    """Finds a record's image below the image root. Does not check that the file exists.

    Raises:
        RecordError: the path is absolute, or leaves the root by `..` or through a symbolic link.
    """
    text = os.fspath(relative)
    pure = pathlib.PurePosixPath(text.replace("\\", "/"))
    if not text.strip() or "\0" in text:
        raise RecordError(f"image path {text!r} is empty or holds a NUL; name a file")
    if pure.is_absolute() or pathlib.PureWindowsPath(text).drive:
        raise RecordError(f"image path {text!r} is absolute; make it relative to the image root")
    if ".." in pure.parts:
        raise RecordError(f"image path {text!r} holds '..'; name the file below the image root")
    base = pathlib.Path(root).resolve()
    path = (base / text).resolve()
    if not path.is_relative_to(base):
        raise RecordError(
            f"image path {text!r} leads out of the image root {base}, to {path}, through a "
            "symbolic link; move the files, mount them there, or choose a root that holds both"
        )
    return path


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
    return tuple(names)


def _parse_turns(obj: Mapping[str, Any], where: str) -> tuple[Turn, ...]:
    entries = obj.get("conversations")
    if not isinstance(entries, list):
        raise RecordError(
            f"{where}: 'conversations' is {_show(entries) if entries is not None else 'missing'}; "
            "give a list of turns"
        )
    turns = [_parse_turn(entry, f"{where}: conversations[{i}]") for i, entry in enumerate(entries)]
    skipped = 1 if turns and turns[0].role != "human" else 0
    turns = turns[skipped:]
    for i, turn in enumerate(turns):
        expected = ("human", "gpt")[i % 2]
        if turn.role != expected:
            raise RecordError(
                f"{where}: conversations[{i + skipped}]: 'from' is {turn.role!r}, expected "
                f"{expected!r}; turns must alternate: join or remove neighbours by the same side"
            )
        if turn.role == "gpt" and not turn.text.strip():
            raise RecordError(
                f"{where}: conversations[{i + skipped}]: 'value' is empty; write the answer, or "
                "remove it and its question"
            )
    if len(turns) < 2 or len(turns) % 2:
        raise RecordError(
            f"{where}: 'conversations' has {len(turns)} usable turns and must end with an answer; "
            "add the answer, or remove the last question"
        )
    return tuple(turns)


def _parse_turn(entry: object, where: str) -> Turn:
    if not isinstance(entry, Mapping):
        raise RecordError(f"{where}: expected an object with 'from' and 'value', {_show(entry)}")
    role, text = entry.get("from"), entry.get("value")
    if role not in ("human", "gpt"):
        raise RecordError(f"{where}: 'from' is {_show(role)}; use 'human' or 'gpt'")
    if not isinstance(text, str):
        raise RecordError(f"{where}: 'value' is {_show(text)}; make it a string")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RecordError(
            f"{where}: 'value' holds half of a surrogate pair at character {error.start}; replace "
            "it (a broken \\ud83d-style escape)"
        ) from error
    return Turn(role, text)


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
            f"{IMAGE_PLACEHOLDER}; write one {IMAGE_PLACEHOLDER} for each image"
        )
    for i, turn in enumerate(fitted):
        if not turn.text.strip():
            raise RecordError(f"{where}: question {i // 2} is empty; write it, or remove it and its answer")
    return fitted


def _read_lines(file: TextIO, source: str) -> Iterator[dict[str, Any]]:
    index = 0
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        where = f"{source}: record {index}, line {number}"
        try:
            obj = json.loads(line.rstrip())
        except json.JSONDecodeError as error:
            raise RecordError(
                f"{where}, column {error.colno}: {error.msg}; a JSONL file holds one whole object "
                "on each line"
            ) from error
        except (ValueError, RecursionError) as error:
            raise RecordError(f"{where}: {error}; nested too deep, or a number too long") from error
        if not isinstance(obj, dict):
            raise RecordError(f"{where}: expected a JSON object, found {_show(obj)}")
        yield obj
        index += 1


class _ArrayReader:
    """Decodes a JSON array of objects from a growing and shrinking buffer of text."""

    def __init__(self, file: TextIO, source: str):
        self._file = file
        self._source = source
        self._decoder = json.JSONDecoder()
        self._buffer = ""
        self._at = 0  # in the buffer
        self._dropped = 0  # characters before the buffer
        self._lines = 0  # line breaks before the buffer
        self._index = 0

    def objects(self) -> Iterator[dict[str, Any]]:
        self._next_character()
        self._at += 1  # the opening bracket, which the caller saw
        character = self._next_character()
        while character != "]" or self._index:
            if character != "{":
                raise self._error("expected a record ('{')" + self._found(character))
            yield self._object()
            self._index += 1
            character = self._next_character()
            if character == "]":
                break
            if character != ",":
                raise self._error("expected ',' or ']' after a record" + self._found(character))
            self._at += 1
            character = self._next_character()
        self._at += 1
        character = self._next_character()
        if character:
            raise self._error("expected nothing after the array's ']'" + self._found(character))

    def _object(self) -> dict[str, Any]:
        while True:
            try:
                obj, self._at = self._decoder.raw_decode(self._buffer, self._at)
                return dict(obj)
            except json.JSONDecodeError as error:
                # An error right at the buffer's end, or an open string, may be just a cut; the
                # longest token that can look wrong when cut is far shorter than 32 characters.
                open_string = error.msg.startswith("Unterminated string")
                cut = open_string or len(self._buffer) - error.pos < 32
                size = len(self._buffer) - self._at
                if cut and size < _LARGEST_RECORD and self._read(max(_CHUNK, size)):
                    continue
                message = f"{error.msg}; the record is broken from there on"
                if cut:
                    message += " or the file is cut off: compare its size with the original's"
                self._at = error.pos
                raise self._error(message) from error
            except (ValueError, RecursionError) as error:
                raise self._error(f"{error}; nested too deep, or a number too long") from error

    def _next_character(self) -> str:
        """Moves to the next character that is not space; returns it, or "" at the end."""
        while True:
            match = _SPACE.match(self._buffer, self._at)
            assert match is not None
            self._at = match.end()
            if self._at < len(self._buffer):
                return self._buffer[self._at]
            if not self._read(_CHUNK):
                return ""

    def _read(self, size: int) -> bool:
        """Drops what is decoded and reads on; False at the end of the file."""
        text = self._file.read(size)
        if not text:
            return False
        self._lines += self._buffer.count("\n", 0, self._at)
        self._dropped += self._at
        self._buffer = self._buffer[self._at :] + text
        self._at = 0
        return True

    def _error(self, message: str) -> RecordError:
        line = self._lines + self._buffer.count("\n", 0, self._at) + 1
        return RecordError(
            f"{self._source}: record {self._index}, line {line}, character "
            f"{self._dropped + self._at}: {message}"
        )

    @staticmethod
    def _found(character: str) -> str:
        return f", found {character!r}" if character else ", found the end: the file is cut off"


def _first_character(file: TextIO) -> str:
    while text := file.read(_CHUNK):
        if text := text.lstrip(" \t\n\r"):
            return text[0]
    return ""


def _show(value: object) -> str:
    text = ascii(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"
