"""Safetensors files: checked whole before any data is used, read and written a tensor at a time.

Eight bytes give the length of a JSON header, which says what the bytes after it are
(https://huggingface.co/docs/safetensors). The official library maps files into memory to read them
and takes all tensors of a file at once to write them; a checkpoint must stream.
"""

import dataclasses
import functools
import json
import math
import os
import pathlib
import reprlib
import struct
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Self

import ml_dtypes
import numpy as np

from sg4v_jax.convert.tensors import ConversionError, Tensor, contiguous

# The format's dtypes that fill whole bytes.
_DTYPES = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "F8_E4M3FNUZ": np.dtype(ml_dtypes.float8_e4m3fnuz),
    "F8_E5M2FNUZ": np.dtype(ml_dtypes.float8_e5m2fnuz),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "F32": np.dtype(np.float32),
    "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64),
    "F64": np.dtype(np.float64),
    "C64": np.dtype(np.complex64),
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
_METADATA = "__metadata__"
_MAX_HEADER = 100_000_000  # the official reader's limit
_MAX_DIMS, _MAX_SIZE = 64, 2**63 - 1  # NumPy's limits
_CHUNK = 1 << 23


def shown(value: object) -> str:
    """A value from a file as messages show it: short, and without control characters."""
    ordinary = isinstance(value, str) and value.isprintable() and len(value) <= 200
    return str(value) if ordinary else reprlib.repr(value)


def is_shape(sizes: object) -> bool:
    """Whether NumPy can take these values from a file as a shape, or as strides."""
    return (
        isinstance(sizes, list | tuple)
        and len(sizes) <= _MAX_DIMS
        and all(type(size) is int and 0 <= size <= _MAX_SIZE for size in sizes)
    )


def is_too_large(shape: Sequence[int], dtype: np.dtype) -> bool:
    """Whether NumPy can't count the bytes; it doesn't let an empty array have any shape either."""
    return math.prod(size or 1 for size in shape) * dtype.itemsize > _MAX_SIZE


@dataclasses.dataclass(frozen=True)
class WeightFile:
    """A file that arrays are read from.

    Every read opens it anew, so that hundreds of shards hold no descriptors, and refuses a file that
    has changed since the first time.
    """

    path: pathlib.Path
    size: int
    modified: int

    @classmethod
    def open(cls, path: pathlib.Path) -> Self:
        """
        Raises:
          ConversionError: there is no such file, or it is the pointer that git-lfs leaves for one.
        """
        try:
            stat = path.stat()
        except OSError as error:
            missing = isinstance(error, FileNotFoundError)
            raise ConversionError([f"{path} does not exist" if missing else f"{path}: {error}"]) from None
        file = cls(path, stat.st_size, stat.st_mtime_ns)
        if file.head(20) == b"version https://git-":
            problem = "is a git-lfs pointer, not the weights; fetch them with `git lfs pull`"
            raise ConversionError([f"{path} {problem}"])
        return file

    def head(self, count: int) -> bytes:
        """The first bytes, fewer than `count` if there are no more."""
        return self.bytes_at("its beginning", 0, min(count, self.size))

    def bytes_at(self, name: str, offset: int, count: int) -> bytes:
        return self.read(name, offset, (count,), np.dtype(np.uint8)).tobytes()

    def read(self, name: str, offset: int, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """A new array with the bytes from `offset` on.

        Raises:
          ConversionError: naming `name`: the file is too short, has changed or can't be read.
        """
        end = offset + math.prod(shape) * dtype.itemsize
        if not 0 <= offset <= end <= self.size:
            problem = f"expected at bytes {offset} to {end}, found a file of {self.size}"
            raise ConversionError([f"{self.path}: {shown(name)}: {problem}"])
        array = np.empty(shape, dtype)
        rest = array.reshape(-1).view(np.uint8).data
        try:
            with open(self.path, "rb", buffering=0) as file:
                stat = os.fstat(file.fileno())
                if (stat.st_size, stat.st_mtime_ns) != (self.size, self.modified):
                    raise ConversionError([f"{self.path}: {shown(name)}: the file has changed while in use"])
                file.seek(offset)
                # One call reads at most 2 GiB, and less when a file system feels like it.
                while rest:
                    count = file.readinto(rest)
                    if not count:
                        raise OSError(f"the file ended {len(rest)} bytes early")
                    rest = rest[count:]
        except OSError as error:
            raise ConversionError([f"{self.path}: {shown(name)}: {error}"]) from error
        return array


@dataclasses.dataclass(frozen=True)
class _Entry:
    """What the header says of a tensor; its bytes are counted from the end of the header."""

    dtype: np.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def open_safetensors(path: pathlib.Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, by name; none is read yet.

    Raises:
      ConversionError: with everything that is wrong with the file: it is none, it is cut short, its
        header is damaged, or tensors overlap, leave holes or don't have the bytes of their shape.
    """
    file = WeightFile.open(path)
    header, start = _read_header(file)
    entries: dict[str, _Entry] = {}
    problems = []
    for name, fields in header.items():
        try:
            entries[name] = _parse_entry(name, fields)
        except ValueError as error:
            problems.append(f"{shown(name)}: {error}")
    problems += _misplaced(entries, file.size - start, complete=not problems)
    if problems:
        raise ConversionError([f"{path} ({file.size} bytes): {problem}" for problem in problems])
    return {
        name: Tensor(
            name,
            entry.shape,
            entry.dtype,
            str(path),
            functools.partial(file.read, name, start + entry.begin, entry.shape, entry.dtype),
        )
        for name, entry in entries.items()
    }


def _read_header(file: WeightFile) -> tuple[dict[str, Any], int]:
    """The header but for its metadata, and where it ends."""

    def error(problem: str) -> ConversionError:
        return ConversionError([f"{file.path} ({file.size} bytes) {problem}"])

    if file.size < 8:
        raise error("is cut short: not even the length of its header is there; fetch it again")
    (length,) = struct.unpack("<Q", file.head(8))
    if length > min(file.size - 8, _MAX_HEADER):
        problem = f"expected a header of at most {_MAX_HEADER}, found {length}"
        raise error(f"is cut short or no safetensors file: {problem} bytes; fetch it again")
    content = file.bytes_at("its header", 8, length)
    if not content.startswith(b"{"):
        raise error(f"is no safetensors file: expected a JSON object, found {content[:20]!r}")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if twice := [shown(key) for key, count in Counter(key for key, _ in pairs).items() if count > 1]:
            raise ValueError(f"{', '.join(twice)} is there twice")
        return dict(pairs)

    try:
        header = json.loads(content.decode(), object_pairs_hook=unique)
    except (ValueError, RecursionError) as reason:
        raise error(f"has a damaged header: {reason}") from reason
    metadata = header.pop(_METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise error(f"has a damaged header: expected strings in {_METADATA}, found {shown(metadata)}")
    return header, 8 + length


def _parse_entry(name: str, fields: Any) -> _Entry:
    try:
        name.encode()
    except UnicodeEncodeError:
        raise ValueError("its name is not Unicode") from None
    if not isinstance(fields, dict):
        raise ValueError(f"expected a JSON object, found {shown(fields)}")
    if absent := [key for key in ("dtype", "shape", "data_offsets") if key not in fields]:
        raise ValueError(f"has no {', no '.join(absent)}")
    code, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(code, str) or code not in _DTYPES:
        raise ValueError(f"expected a dtype of {', '.join(_DTYPES)}, found {shown(code)}")
    if not is_shape(shape):
        raise ValueError(f"expected a shape of at most {_MAX_DIMS} whole numbers, found {shown(shape)}")
    if is_too_large(shape, _DTYPES[code]):
        raise ValueError(f"a {code} of shape {shown(shape)} is larger than anything")
    if not is_shape(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"expected data_offsets [begin, end], found {shown(offsets)}")
    begin, end = offsets
    expected = math.prod(shape) * _DTYPES[code].itemsize
    if end - begin != expected:
        raise ValueError(f"expected {expected} bytes for {code} {shown(shape)}, found {end - begin}")
    return _Entry(_DTYPES[code], tuple(shape), begin, end)


def _misplaced(entries: Mapping[str, _Entry], size: int, *, complete: bool) -> Iterator[str]:
    """What is wrong with the places of tensors in `size` bytes, which `complete` entries fill."""
    position, before = 0, ""
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin > position and complete:
            yield f"{shown(name)}: the {entry.begin - position} bytes before it belong to no tensor"
        if entry.begin < position:
            yield f"{shown(name)}: its bytes {entry.begin} to {entry.end} overlap those of {shown(before)}"
        if entry.end > position:
            position, before = entry.end, name
    if position > size:
        lost = [shown(name) for name, entry in entries.items() if entry.end > size]
        names = ", ".join(lost[:3]) + (f" and {len(lost) - 3} more" if len(lost) > 3 else "")
        yield f"cut short: {position - size} bytes are missing, of {names}; fetch it again"
    elif position < size and complete:
        yield f"the {size - position} bytes after the last tensor belong to none"


def write_safetensors(
    path: pathlib.Path,
    specs: Sequence[tuple[str, tuple[int, ...], np.dtype]],
    arrays: Iterable[np.ndarray],
    *,
    metadata: Mapping[str, str] = {"format": "pt"},
) -> None:
    """Writes a safetensors file, one array after the other.

    It is neither atomic nor synced to disk: that is up to who makes the directory around it.

    Args:
      path: the file; one that is there is replaced.
      specs: (name, shape, dtype) of the tensors, in the order in which the file has them. Larger
        dtypes come first, if there are several, for each tensor has to lie at a multiple of its own.
      arrays: the tensors in that order, in any memory layout. Each is let go before the next is asked
        for.
      metadata: as in the header. `{"format": "pt"}` is what transformers wants to see.

    Raises:
      ConversionError: a spec that no file can have, or arrays that aren't those of `specs`.
    """
    header: dict[str, Any] = {_METADATA: dict(metadata)} if metadata else {}
    begin = 0
    for name, shape, dtype in specs:
        if dtype not in _CODES or name in header or name == _METADATA or begin % dtype.itemsize:
            problem = f"can't be written as {dtype} at byte {begin}: a dtype that safetensors lacks, "
            raise ConversionError([f"{path}: {shown(name)} {problem}a name twice, or out of alignment"])
        end = begin + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    content = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    content += b" " * (-len(content) % 8)
    remaining = iter(arrays)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(content)) + content)
        for name, shape, dtype in specs:
            array = next(remaining, None)
            found = "none" if array is None else f"{array.dtype} {array.shape}"
            if array is None or (array.shape, array.dtype) != (shape, dtype):
                raise ConversionError([f"{path}: {shown(name)}: expected {dtype} {shape}, found {found}"])
            file.writelines(_contiguous(array))
            del array
        if next(remaining, None) is not None:
            raise ConversionError([f"{path}: expected {len(specs)} tensors, found more"])


def _contiguous(array: np.ndarray) -> Iterator[memoryview]:
    """The bytes of an array in C order; of one that lies otherwise, a part at a time is copied."""
    if array.flags.c_contiguous or array.nbytes <= _CHUNK:
        yield contiguous(array).reshape(-1).view(np.uint8).data
    else:
        step = max(1, _CHUNK * len(array) // array.nbytes)
        for row in range(0, len(array), step):
            yield from _contiguous(array[row : row + step] if len(array) > 1 else array[0])
