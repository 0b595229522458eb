"""JSON arrays and JSONL, one entry at a time, in memory that does not grow with the file.

The released files are single arrays of up to 1.5 GB. An entry that is not JSON does not end the
reading: it is handed on as an error with its place, and reading goes on at the next entry. A file that
is cut off always is an error. Every entry has a byte position, where a second reader can start: that
is how several processes share a file.
"""

import codecs
import dataclasses
import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterator
from typing import Any, BinaryIO

from etils import epath

_CHUNK = 1 << 20
# The longest entry, and how far to look for the next one after one that is broken.
_LARGEST_RECORD = 1 << 24
# A separator may be cut by the end of what is read so far; it is shorter than this.
_OVERLAP = 1 << 10
_SPACE = re.compile(r"[ \t\n\r]*")
_FIRST_KEY = re.compile(r'\s*\[\s*\{\s*"((?:[^"\\]|\\.){1,99})"\s*:')
_END = re.compile(r"\]\s*\Z")
_CUT_OFF = "the file is cut off; compare its size with the original's, and fetch it again"


class RecordError(ValueError):
    """A data file or one of its records can't be used; the message says where, what and the fix.

    Attributes:
      kind: what is wrong, one of `data.defects.KINDS`.
    """

    def __init__(self, message: str, kind: str = "malformed_record"):
        super().__init__(message)
        self.kind = kind

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self), self.kind)


@dataclasses.dataclass(frozen=True, slots=True)
class Position:
    """Where an entry is: its number from 0, its first byte from 0, its line from 1."""

    index: int
    offset: int
    line: int

    def __str__(self) -> str:
        return f"record {self.index}, line {self.line}, byte {self.offset}"


@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
    """One entry of a file: any JSON value, or the error that there is instead."""

    position: Position
    value: object
    error: RecordError | None = None


@dataclasses.dataclass(frozen=True)
class Span:
    """`count` entries of a file from `start` on."""

    start: Position
    count: int


@dataclasses.dataclass(frozen=True)
class Split:
    """A file cut into spans.

    Attributes:
      spans: all entries, in order.
      entries: how many there are.
      sha256: hex digest of the file.
    """

    spans: tuple[Span, ...]
    entries: int
    sha256: str


def read_entries(path: str | os.PathLike[str], start: Position | None = None) -> Iterator[Entry]:
    """Reads the entries of a JSON array or a JSONL file one by one.

    Args:
      path: a local path or a URI.
      start: the position of the entry to start at, from an earlier reading; the first by default.

    Raises:
      RecordError: the file is no JSON array or JSONL, or is cut off.
    """
    yield from _read(path, start, None)


def read_span(path: str | os.PathLike[str], span: Span) -> Iterator[Entry]:
    """Reads the entries of one span."""
    return itertools.islice(read_entries(path, span.start), span.count)


def split_entries(path: str | os.PathLike[str], size: int) -> Split:
    """Reads a file once and cuts it into spans of `size` entries.

    Raises:
      RecordError: as `read_entries`.
    """
    digest = hashlib.sha256()
    starts, entries = [], 0
    for entry in _read(path, None, digest):
        if entries % size == 0:
            starts.append(entry.position)
        entries += 1
    counts = [min(size, entries - i * size) for i in range(len(starts))]
    spans = tuple(Span(start, count) for start, count in zip(starts, counts, strict=True))
    return Split(spans, entries, digest.hexdigest())


def _read(path: str | os.PathLike[str], start: Position | None, digest: Any) -> Iterator[Entry]:
    source = os.fspath(path)
    with epath.Path(path).open("rb") as file:
        head = _head(file)
        character = head.decode("utf-8", "replace").lstrip("\ufeff \t\n\r")[:1]
        mark = len(codecs.BOM_UTF8) if head.startswith(codecs.BOM_UTF8) else 0
        at = start or Position(0, mark, 1)
        file.seek(at.offset)
        if digest:
            digest.update(head[:mark])
        if character == "[":
            yield from _Array(file, source, at, digest, head[mark:]).entries(opened=start is not None)
        elif character == "{":
            yield from _lines(file, source, at, digest)
        else:
            found = f"starts with {character!a}" if character else "is empty"
            raise RecordError(
                f"{source}: the file {found}; expected a JSON array of records ('[') or one JSON "
                "object on each line ('{'), as UTF-8. Unpack it if it is compressed"
            )


def _head(file: BinaryIO) -> bytes:
    """The start of the file, up to its first 4 KB that are not only space."""
    head = b""
    while chunk := file.read(1 << 12):
        head = chunk if not head.strip() else head + chunk
        if head.removeprefix(codecs.BOM_UTF8).strip():
            break
    return head


def _lines(file: BinaryIO, source: str, start: Position, digest: Any) -> Iterator[Entry]:
    index, offset, number = start.index, start.offset, start.line
    while line := file.readline(_LARGEST_RECORD):
        if digest:
            digest.update(line)
        at = Position(index, offset, number)
        ended = line.endswith(b"\n")
        if not ended and len(line) == _LARGEST_RECORD:
            raise RecordError(f"{source}: {at}: the line is longer than {_LARGEST_RECORD} bytes; split it")
        offset, number = offset + len(line), number + 1
        if not line.strip():
            continue
        index += 1
        try:
            yield Entry(at, json.loads(line.rstrip().decode()))
        except UnicodeDecodeError as error:
            yield _broken(source, at, f"not UTF-8 at byte {at.offset + error.start}; save it as UTF-8")
        except json.JSONDecodeError as error:
            if not ended and _at_the_end(error):
                raise RecordError(f"{source}: {at}, column {error.colno}: {error.msg}; {_CUT_OFF}") from None
            message = f"column {error.colno}: {error.msg}; a JSONL file holds one whole object on each line"
            yield _broken(source, at, message)
        except (ValueError, RecursionError):
            yield _broken(source, at, "nested too deep, or a number too long")


def _broken(source: str, at: Position, message: str) -> Entry:
    return Entry(at, None, RecordError(f"{source}: {at}: {message}", "malformed_json"))


def _at_the_end(error: json.JSONDecodeError) -> bool:
    return error.msg.startswith("Unterminated string") or not error.doc[error.pos :].strip()


class _Array:
    """Decodes the entries of a JSON array from a growing and shrinking buffer of text."""

    def __init__(self, file: BinaryIO, source: str, start: Position, digest: Any, head: bytes):
        self._file, self._source, self._digest = file, source, digest
        # Bytes that are not UTF-8 become surrogates, which `_check_text` finds in their entry.
        self._decode = codecs.getincrementaldecoder("utf-8")("surrogateescape").decode
        self._json = json.JSONDecoder()
        self._buffer, self._at = "", 0
        # Counted up to buffer[_counted].
        self._index, self._offset, self._line = start.index, start.offset, start.line
        self._counted = 0
        # No JSON string holds an unescaped quote, so this is seen between entries only: unless an
        # entry has objects with these keys inside it, of which the schema has none.
        first = _FIRST_KEY.match(head.decode("utf-8", "replace"))
        keys = {"id", "image", "conversations", *([first[1]] if first else [])}
        known = "|".join(re.escape(key) for key in sorted(keys))
        self._next_entry = re.compile(r",\s*(?=\{\s*" + f'"(?:{known})"' + r"\s*:)")

    def entries(self, opened: bool) -> Iterator[Entry]:
        """The entries from here on; `opened` if that is behind the opening bracket."""
        if not opened:
            self._next_character()
            self._at += 1  # the opening bracket, which the caller saw
            if self._next_character() == "]":
                self._finish()
                return
        while True:
            self._next_character()
            entry = self._entry()
            yield entry
            if entry.error:
                if not self._skip():
                    return
                continue
            self._index += 1
            character = self._next_character()
            if character == "]":
                self._finish()
                return
            if character == ",":
                self._at += 1
                continue
            at = self._position()
            if not character:
                raise RecordError(f"{self._source}: {at}: expected ',' or ']' after a record; {_CUT_OFF}")
            yield _broken(self._source, at, f"expected ',' or ']' after a record, found {character!a}")
            if not self._skip():
                return

    def _entry(self) -> Entry:
        """Decodes the entry at `_at`, reading on for as long as it may be only cut."""
        at = self._position()
        while True:
            try:
                value, end = self._json.raw_decode(self._buffer, self._at)
            except json.JSONDecodeError as error:
                # An error right at the buffer's end, or an open string, may be just a cut; the
                # longest token that can look wrong when cut is far shorter than 32 characters.
                cut = error.msg.startswith("Unterminated string") or len(self._buffer) - error.pos < 32
                size = len(self._buffer) - self._at
                if cut and size < _LARGEST_RECORD and self._fill(max(_CHUNK, size)):
                    continue
                place = at.offset + len(_encode(self._buffer[self._at : error.pos]))
                if cut and size < _LARGEST_RECORD and _at_the_end(error):
                    raise RecordError(
                        f"{self._source}: {at}: {error.msg} at byte {place}; {_CUT_OFF}"
                    ) from None
                return _broken(self._source, at, f"{error.msg} at byte {place}; correct it, or drop it")
            except (ValueError, RecursionError):
                return _broken(self._source, at, "nested too deep, or a number too long")
            # A number may go on after the buffer's end.
            if end == len(self._buffer) and self._fill(_CHUNK):
                continue
            if mistake := _not_utf8(self._buffer[self._at : end]):
                return _broken(self._source, at, f"not UTF-8 {mistake}; save it as UTF-8")
            self._at = end
            return Entry(at, value)

    def _skip(self) -> bool:
        """Moves from a broken entry on to the next one; False if there is none."""
        start, skipped = self._position(), 0
        while True:
            if match := self._next_entry.search(self._buffer, self._at):
                self._at = match.end()
                self._index += 1
                return True
            kept = max(self._at, len(self._buffer) - _OVERLAP)
            skipped += kept - self._at
            if skipped > _LARGEST_RECORD:
                raise RecordError(
                    f"{self._source}: {start}: no next record within {_LARGEST_RECORD} characters of "
                    "this broken one; correct it"
                )
            if self._fill(_CHUNK, kept):
                continue
            if not _END.search(self._buffer, self._at):
                raise RecordError(f"{self._source}: {start}: {_CUT_OFF}")
            return False

    def _finish(self) -> None:
        self._at += 1
        if character := self._next_character():
            raise RecordError(
                f"{self._source}: {self._position()}: expected nothing after the array's ']', found "
                f"{character!a}"
            )

    def _next_character(self) -> str:
        """Moves to the next character that is not space; returns it, or "" at the end."""
        while True:
            match = _SPACE.match(self._buffer, self._at)
            assert match is not None
            self._at = match.end()
            if self._at < len(self._buffer):
                return self._buffer[self._at]
            if not self._fill(_CHUNK):
                return ""

    def _fill(self, size: int, keep: int | None = None) -> bool:
        """Reads on, dropping what is before `keep` (`_at`); False at the end of the file."""
        data = self._file.read(size)
        text = self._decode(data, final=not data)
        if not data and not text:
            return False
        if self._digest:
            self._digest.update(data)
        self._at = self._at if keep is None else keep
        self._position()
        self._buffer = self._buffer[self._at :] + text
        self._at = self._counted = 0
        return True

    def _position(self) -> Position:
        """Where `_at` is."""
        passed = self._buffer[self._counted : self._at]
        self._offset += len(_encode(passed))
        self._line += passed.count("\n")
        self._counted = self._at
        return Position(self._index, self._offset, self._line)


def _encode(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def _not_utf8(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"at byte {len(_encode(text[: error.start]))} of it"
    return ""
