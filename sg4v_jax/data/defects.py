"""What can be wrong with a record or its images: one list, and one function that looks for all of it.

`sg4v data check` reports what it finds; `sg4v data build` leaves out, or stops at, the same records.
"""

import dataclasses
import io
import math
import os
from collections.abc import Mapping
from typing import Any

from etils import epath
from PIL import Image, UnidentifiedImageError

from sg4v_jax.data.image import ImageError, load_image
from sg4v_jax.data.json_stream import Entry
from sg4v_jax.data.records import (
    IMAGE_PLACEHOLDER,
    Record,
    RecordError,
    image_names,
    parse_record,
    resolve_image,
)
from sg4v_jax.data.sources import SOURCES

MAX_PIXELS = 100_000_000


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of defect.

    Attributes:
      bad: whether a record with it can't be used. Others are used, and worth knowing.
      meaning: what it is and, for those that are used, what becomes of it.
    """

    bad: bool
    meaning: str


KINDS: Mapping[str, Kind] = {
    "malformed_json": Kind(True, "the entry is not JSON, or not UTF-8"),
    "malformed_record": Kind(True, "no object, or `id` or `image` of the wrong type"),
    "malformed_conversation": Kind(True, "no list of turns with `from` and `value`"),
    "broken_text": Kind(True, "half of a surrogate pair: no UTF-8 file can hold it"),
    "wrong_alternation": Kind(True, "two turns in a row by the same side"),
    "no_answer": Kind(True, "no turns, or a last question without an answer"),
    "empty_answer": Kind(True, "an answer without text"),
    "empty_question": Kind(True, "a question without text and image"),
    "image_count": Kind(True, f"the number of `{IMAGE_PLACEHOLDER}` is not the number of images"),
    "path_outside": Kind(True, "an image path that leaves the image root"),
    "missing_image": Kind(True, "no such image file"),
    "unreadable_image": Kind(True, "the image file can't be read"),
    "zero_byte_image": Kind(True, "an image file of no bytes"),
    "huge_image": Kind(True, f"more than {MAX_PIXELS} pixels; a small file can claim that"),
    "corrupt_image": Kind(True, "not an image, damaged or cut off"),
    "mistyped_image": Kind(False, "the extension names another format than the content has; it is read"),
    "animated_image": Kind(False, "several frames; the first counts"),
    "leading_answer": Kind(False, "the first turn is an answer; it is left out"),
    "placeholder_added": Kind(
        False, f"an image without any `{IMAGE_PLACEHOLDER}`; it is put in front of the first question"
    ),
    "placeholder_joined": Kind(False, f"several `{IMAGE_PLACEHOLDER}` for one image; they become one"),
    "placeholder_as_text": Kind(
        False, f"`{IMAGE_PLACEHOLDER}` in an answer, or without any image; it stays as text"
    ),
    "duplicate_id": Kind(False, "an id that an earlier record has; both are used"),
    "duplicate_record": Kind(False, "the same as an earlier record; both are used"),
    "wrong_template": Kind(
        False, "the template of training can't write it, such as several turns for `plain`; passed over there"
    ),
    "too_long": Kind(False, "longer than the sequence; it is cut at the end"),
}


@dataclasses.dataclass(frozen=True)
class Defect:
    """One thing that is wrong.

    Attributes:
      kind: one of `KINDS`.
      message: where, what and the fix.
      image: path of the image it is about, or "".
    """

    kind: str
    message: str
    image: str = ""

    @property
    def bad(self) -> bool:
        return KINDS[self.kind].bad


@dataclasses.dataclass(frozen=True)
class Inspection:
    """What there is to know about an entry.

    Attributes:
      id: the record's id, or "".
      names: paths of its images, also of a record that can't be used.
      record: the record, or None if it can't be used.
      images: the bytes of its images' files; empty if it can't be used.
      defects: all that was found.
      error: the first defect that makes it unusable, as an exception.
    """

    id: str
    names: tuple[str, ...]
    record: Record | None
    images: tuple[bytes, ...]
    defects: tuple[Defect, ...]
    error: RecordError | ImageError | None


def inspect_entry(
    entry: Entry,
    *,
    source: str,
    image_root: str | os.PathLike[str],
    answered: bool = True,
    decode: bool = True,
) -> Inspection:
    """Looks for everything that can be wrong with an entry of a data file by itself.

    Args:
      entry: from `data.json_stream`.
      source: the file's name, for messages.
      image_root: directory or URI that image paths are relative to.
      answered: False also takes a last question without an answer.
      decode: False looks at the headers of images only, which finds all but damaged ones.
    """
    record, defects, where = None, [], f"{source}: {entry.position}"
    names = image_names(entry.value)
    error: RecordError | ImageError | None = entry.error
    if error is None:
        try:
            record = parse_record(entry.value, source=source, index=entry.position, answered=answered)
            defects += _about_turns(entry.value, record, where)
        except RecordError as found:
            error = found
    if isinstance(error, RecordError):
        defects.append(Defect(error.kind, str(error)))
    images = []
    for name in names:
        try:
            path = resolve_image(image_root, name)
            data = _read_image(path, name, image_root)
            images.append(data)
            notes = inspect_image(data, name, decode=decode)
            defects += [dataclasses.replace(note, message=f"{where}: {note.message}") for note in notes]
        except (RecordError, _ImageDefect) as found:
            placed = type(found)(f"{where}: {found}", found.kind)
            defects.append(Defect(found.kind, str(placed), name))
            error = error or placed
    if error:
        record, images = None, []
    id_ = entry.value.get("id", "") if isinstance(entry.value, Mapping) else ""
    return Inspection(record.id if record else str(id_), names, record, tuple(images), tuple(defects), error)


class _ImageDefect(ImageError):
    def __init__(self, message: str, kind: str):
        super().__init__(message)
        self.kind = kind

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self), self.kind)


def inspect_image(data: bytes, name: str, *, decode: bool = True) -> list[Defect]:
    """Looks at an image file's bytes; what is found can be lived with.

    Raises:
      ImageError: it can't be used.
    """
    if not data:
        raise _ImageDefect(f"{name}: the file is empty; fetch it again", "zero_byte_image")
    try:
        with Image.open(io.BytesIO(data)) as image:
            width, height = image.size
            form, frames = image.format or "", getattr(image, "n_frames", 1)
    except Image.DecompressionBombError as error:
        raise _ImageDefect(f"{name}: {error}; make it smaller", "huge_image") from error
    except UnidentifiedImageError as error:  # Its text names an address in memory.
        message = f"{name}: can't be decoded ({len(data)} bytes): no image format that is known"
        raise _ImageDefect(message, "corrupt_image") from error
    # A damaged file makes Pillow raise nearly anything, from OSError to IndexError.
    except Exception as error:
        message = f"{name}: can't be decoded ({len(data)} bytes): {str(error) or type(error).__name__}"
        raise _ImageDefect(message, "corrupt_image") from error
    if width * height > MAX_PIXELS:
        raise _ImageDefect(
            f"{name}: {width} x {height} is more than {MAX_PIXELS} pixels; make it smaller", "huge_image"
        )
    if decode:
        try:
            load_image(data, name=name, max_pixels=MAX_PIXELS)
        except ImageError as error:
            raise _ImageDefect(str(error), "corrupt_image") from error
    return list(_about_format(name, form, frames))


def _about_format(name: str, form: str, frames: int) -> list[Defect]:
    found = []
    # Cameras write JPEGs with a preview behind the image, which Pillow calls MPO.
    form, frames = ("JPEG", 1) if form == "MPO" else (form, frames)
    suffix = epath.Path(name).suffix.lower()
    named = Image.registered_extensions().get(suffix)
    if named and named != form:
        found.append(Defect("mistyped_image", f"{name}: the extension says {named}, it is a {form}", name))
    if frames > 1:
        found.append(Defect("animated_image", f"{name}: a {form} of {frames} frames", name))
    return found


def allowed_bad(cap: str, records: int) -> int:
    """How many of `records` may be bad.

    Args:
      cap: a number, or a part of the records such as `1%`.

    Raises:
      ValueError: it is neither.
    """
    text = cap.strip()
    try:
        if text.endswith("%"):
            share = float(text[:-1]) / 100
            if 0 <= share <= 1:
                return math.floor(share * records)
        elif int(text) >= 0:
            return int(text)
    except ValueError:
        pass
    raise ValueError(f"max-bad {cap!r} is neither a number of records nor a part of them; write 100 or 1%")


def _read_image(path: epath.Path, name: str, root: str | os.PathLike[str]) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        known = SOURCES.get(name.partition("/")[0])
        hint = f"; {known.folders[0]} is from {known.origin}" if known else ""
        message = f"{name}: no such file below {os.fspath(root)}{hint}"
        raise _ImageDefect(message, "missing_image") from None
    except OSError as error:
        message = f"{name}: can't be read below {os.fspath(root)}: {error.strerror or error}"
        raise _ImageDefect(message, "unreadable_image") from error


def _about_turns(obj: object, record: Record, where: str) -> list[Defect]:
    """What `parse_record` puts right without a word."""
    assert isinstance(obj, Mapping)
    turns = obj["conversations"]
    kinds = []
    if turns[0]["from"] == "gpt":
        kinds.append("leading_answer")
        turns = turns[1:]
    asked = sum(turn["value"].count(IMAGE_PLACEHOLDER) for turn in turns if turn["from"] == "human")
    answers = sum(turn["value"].count(IMAGE_PLACEHOLDER) for turn in turns if turn["from"] == "gpt")
    if record.images and not asked:
        kinds.append("placeholder_added")
    elif record.images and asked > len(record.images):
        kinds.append("placeholder_joined")
    if answers or (asked and not record.images):
        kinds.append("placeholder_as_text")
    return [Defect(kind, f"{where} (id {record.id!r}): {KINDS[kind].meaning}") for kind in kinds]
