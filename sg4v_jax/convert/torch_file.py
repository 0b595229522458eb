"""PyTorch's files of weights, read without PyTorch and without running what is in them.

Such a file is a zip archive with the bytes of each storage and `data.pkl`, which says how tensors lie
in them (https://docs.pytorch.org/docs/stable/notes/serialization.html). A pickle is a program. Here
nothing runs it: its opcodes are only looked at, one by one. Those that a state dict needs make plain
containers and records of tensors, and what it wants to call is compared with a short list of names.
"""

import dataclasses
import math
import pathlib
import pickletools
import struct
import zipfile
from collections import Counter
from typing import Any

import ml_dtypes
import numpy as np

from sg4v_jax.convert.safetensors_file import WeightFile, is_shape, is_too_large, shown
from sg4v_jax.convert.tensors import ConversionError, Tensor, contiguous

# The largest models' are below 1 MiB. It bounds what a hostile one makes of memory: 100 times as much.
_MAX_PICKLE = 1 << 24
# How large a tensor may become that repeats its elements, if its file is smaller.
_MAX_REPEATED = 1 << 20


@dataclasses.dataclass(frozen=True)
class _Function:
    """Something that a pickle may call."""

    name: str


@dataclasses.dataclass(frozen=True)
class _StorageType:
    dtype: np.dtype | None  # None: of bytes, whose tensors say their dtype themselves


@dataclasses.dataclass(frozen=True)
class _Storage:
    key: str
    count: int
    dtype: np.dtype | None


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class _Tensor:
    """A tensor as the pickle describes it. Where the type is Any, it may be anything."""

    storage: _Storage
    dtype: np.dtype | None
    offset: Any
    shape: Any
    strides: Any
    flags: Any


_DTYPES = {
    name: np.dtype(getattr(ml_dtypes, name, name))
    for name in (
        *("float16", "bfloat16", "float32", "float64", "complex64", "complex128", "bool"),
        *("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
        *("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"),
    )
}
_STORAGES = {
    **{"Half": "float16", "BFloat16": "bfloat16", "Float": "float32", "Double": "float64"},
    **{"ComplexFloat": "complex64", "ComplexDouble": "complex128", "Bool": "bool"},
    **{"Char": "int8", "Short": "int16", "Int": "int32", "Long": "int64", "Byte": "uint8"},
}
_FUNCTIONS = (
    "collections OrderedDict",
    "torch Size",
    "torch.serialization _get_layout",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_tensor_v3",
    "torch._utils _rebuild_parameter",
    "torch._utils _rebuild_parameter_with_state",
)
# All that a pickle may name, as "module name".
_GLOBALS: dict[str, object] = {
    **{name: _Function(name) for name in _FUNCTIONS},
    **{f"torch {name}Storage": _StorageType(_DTYPES[dtype]) for name, dtype in _STORAGES.items()},
    **{f"torch.storage {name}": _StorageType(None) for name in ("UntypedStorage", "_UntypedStorage")},
    **{f"torch {name}": dtype for name, dtype in _DTYPES.items()},
}


def open_torch(path: pathlib.Path) -> dict[str, Tensor]:
    """The tensors of a PyTorch file (`torch.save` since 1.6), by name; none is read yet.

    The file holds a dict of tensors, or one with such a dict as its "state_dict". Numbers, strings
    and None among the tensors are left out.

    Raises:
      ConversionError: with everything that is wrong with the file: it is none or an older one, it is
        cut short, its pickle asks for anything but tensors, or tensors don't lie within their storage.
    """
    file = WeightFile.open(path)
    records = _read_directory(file)
    described, problems = _select(_interpret(_read_pickle(file, records), f"{path}: data.pkl"))
    problems = [f"{path}: {problem}" for problem in problems]
    tensors = {}
    for name, tensor in described.items():
        try:
            tensors[name] = _open_tensor(file, records, name, tensor)
        except ConversionError as error:
            problems += error.problems
        except ValueError as error:
            problems.append(f"{path}: {shown(name)}: {error}")
    if problems:
        raise ConversionError(problems)
    return tensors


def _read_directory(file: WeightFile) -> dict[str, zipfile.ZipInfo]:
    """The archive's records, by their names within its folder."""

    def error(problem: str) -> ConversionError:
        return ConversionError([f"{file.path} ({file.size} bytes) {problem}"])

    head = file.head(512)
    # Before 1.6 it was a bare pickle, before that a tar archive.
    if head.startswith(b"\x80") or head[257:262] == b"ustar":
        fix = "load and save it with a current PyTorch, or use the checkpoint's safetensors files"
        raise error(f"is in the format that PyTorch had before 1.6; {fix}")
    if not head.startswith(b"PK\x03\x04"):
        raise error("is cut short or no PyTorch file; fetch it again")
    try:
        with zipfile.ZipFile(file.path) as archive:
            infos = {info.filename: info for info in archive.infolist()}
            names = Counter(archive.namelist())
    except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error, OSError) as reason:
        raise error(f"is cut short or damaged; fetch it again ({reason})") from reason
    if twice := [shown(name) for name, count in names.items() if count > 1]:
        raise error(f"has two records {', '.join(twice)}")
    folders = [name[:-8] for name in names if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(folders) != 1:
        raise error(f"is no PyTorch file of weights: expected one data.pkl, found {len(folders)}")
    prefix = folders[0]
    return {name.removeprefix(prefix): info for name, info in infos.items() if name.startswith(prefix)}


def _read_pickle(file: WeightFile, records: dict[str, zipfile.ZipInfo]) -> bytes:
    def content(name: str, limit: int) -> bytes:
        if records[name].file_size > limit:
            raise ValueError(f"{name}: expected at most {limit} bytes, found {records[name].file_size}")
        return file.bytes_at(name, _begin(file, records[name]), records[name].file_size)

    try:
        if "byteorder" in records and content("byteorder", 16) != b"little":
            raise ValueError("byteorder: expected little, found another; save the file on another machine")
        return content("data.pkl", _MAX_PICKLE)
    except ConversionError:
        raise
    except ValueError as error:
        raise ConversionError([f"{file.path}: {error}"]) from error


def _begin(file: WeightFile, record: zipfile.ZipInfo) -> int:
    """Where a record's bytes begin, by the header in front of them.

    Raises:
      ValueError: they aren't there as they are.
    """
    name = f"record {shown(record.filename)}"
    stored = record.compress_type == zipfile.ZIP_STORED and record.compress_size == record.file_size
    if record.flag_bits & 1 or not stored:
        raise ValueError(f"{name} is compressed or encrypted, as PyTorch's never are")
    header = file.bytes_at(name, record.header_offset, 30)
    signature, name_length, extra_length = struct.unpack("<4s22xHH", header)
    recorded = file.bytes_at(name, record.header_offset + 30, name_length)
    encoding = "utf-8" if record.flag_bits & 0x800 else "cp437"
    if signature != b"PK\x03\x04" or recorded != record.orig_filename.encode(encoding):
        raise ValueError(f"{name} is not where the archive's directory says")
    begin = record.header_offset + 30 + name_length + extra_length
    if begin + record.file_size > file.size:
        raise ValueError(f"{name} ends {begin + record.file_size - file.size} bytes after the file")
    return begin


def _interpret(program: bytes, where: str) -> object:
    """What a pickle holds, made of dicts, lists, tuples, constants and the records of this file.

    Raises:
      ConversionError: it wants something else.
    """
    machine, position = _Machine(), 0
    try:
        for opcode, argument, at in pickletools.genops(program):
            position = at or 0
            machine.step(opcode.name, argument)
        (content,) = machine.stack
    except (IndexError, KeyError) as error:
        raise ConversionError([f"{where} at byte {position}: damaged: it uses what isn't there"]) from error
    except ValueError as error:
        raise ConversionError([f"{where} at byte {position}: {error}"]) from error
    return content


class _Machine:
    """The stack machine that pickles are written for, without the opcodes that state dicts don't use."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self._below_marks: list[list[Any]] = []
        self._memo: dict[int, Any] = {}

    def step(self, opcode: str, argument: Any) -> None:
        stack = self.stack
        match opcode:
            case "PROTO" | "FRAME" | "STOP":
                pass
            case "MARK":
                self._below_marks.append(stack)
                self.stack = []
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[opcode])
            case "INT" | "BININT" | "BININT1" | "BININT2" | "LONG" | "LONG1" | "BINFLOAT":
                stack.append(argument)
            case "SHORT_BINUNICODE" | "BINUNICODE" | "BINUNICODE8":
                stack.append(argument)
            case "EMPTY_DICT" | "EMPTY_LIST" | "EMPTY_TUPLE":
                stack.append({"DICT": {}, "LIST": [], "TUPLE": ()}[opcode[6:]])
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(reversed([stack.pop() for _ in range(int(opcode[-1]))])))
            case "TUPLE" | "APPENDS" | "SETITEMS":
                self.stack = self._below_marks.pop()
                self._collect(opcode, stack)
            case "APPEND":
                self._collect("APPENDS", [stack.pop()])
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                self._collect("SETITEMS", [key, value])
            case "BINGET" | "LONG_BINGET":
                stack.append(self._memo[argument])
            case "BINPUT" | "LONG_BINPUT" | "MEMOIZE":
                self._memo[len(self._memo) if opcode == "MEMOIZE" else argument] = stack[-1]
            case "GLOBAL":
                stack.append(_find(argument))
            case "STACK_GLOBAL":
                name, module = stack.pop(), stack.pop()
                stack.append(_find(f"{_expect(str, module)} {_expect(str, name)}"))
            case "BINPERSID":
                stack.append(_storage(stack.pop()))
            case "REDUCE":
                arguments, function = stack.pop(), stack.pop()
                stack.append(_call(function, arguments))
            case "BUILD":
                # The versions that an OrderedDict of parameters has as an attribute.
                stack.pop()
                _expect(dict, stack[-1])
            case _:
                raise ValueError(f"no state dict has the opcode {opcode}")

    def _collect(self, opcode: str, items: list[Any]) -> None:
        if opcode == "TUPLE":
            self.stack.append(tuple(items))
        elif opcode == "APPENDS":
            _expect(list, self.stack[-1]).extend(items)
        else:
            target = _expect(dict, self.stack[-1])
            for key, value in zip(items[::2], items[1::2], strict=True):
                # Tuples of tuples of tuples can take forever to hash.
                if not isinstance(key, str | int | float | None) or key in target:
                    raise ValueError(f"the key {shown(key)} is there twice, or neither text nor number")
                target[key] = value


def _expect(kind: type, value: Any) -> Any:
    if not isinstance(value, kind):
        raise ValueError(f"expected a {_called(kind)}, found a {_called(type(value))}")
    return value


def _called(kind: type) -> str:
    return kind.__name__.strip("_")


def _find(name: str) -> object:
    if name not in _GLOBALS:
        danger = "a file that does may run code in whatever else loads it"
        raise ValueError(f"asks for {shown(name.replace(' ', '.'))}, which no state dict needs; {danger}")
    return _GLOBALS[name]


def _storage(identity: Any) -> _Storage:
    match identity:
        case ("storage", _StorageType() as kind, str() as key, str(), int() as count) if count >= 0:
            return _Storage(key, count, kind.dtype)
    raise ValueError("expected the type, key, device and length of a storage, found something else")


def _call(function: Any, arguments: Any) -> Any:
    """What one of `_FUNCTIONS` would return."""
    match _expect(_Function, function).name.split()[-1], _expect(tuple, arguments):
        case "OrderedDict", ():
            return {}
        case ("Size", (tuple() as value,)) | ("_get_layout", (str() as value,)):
            return value
        case "_rebuild_tensor_v2", (_Storage() as storage, offset, shape, strides, _, _, *flags):
            return _Tensor(storage, storage.dtype, offset, shape, strides, flags)
        case "_rebuild_tensor_v3", (
            _Storage() as storage, offset, shape, strides, _, _, np.dtype() as dtype, *flags
        ):  # fmt: skip
            return _Tensor(storage, dtype, offset, shape, strides, flags)
        case (("_rebuild_parameter" | "_rebuild_parameter_with_state"), (_Tensor() as tensor, *_)):
            return tensor
    raise ValueError(f"calls {function.name.replace(' ', '.')} with what it does not take")


def _select(content: Any) -> tuple[dict[str, _Tensor], list[str]]:
    """The tensors of what a pickle holds, and problems with what else there is."""
    if not isinstance(content, dict):
        return {}, [f"expected a dict of tensors, found a {_called(type(content))}"]
    problems = []
    if isinstance(content.get("state_dict"), dict):
        beside = [shown(name) for name, value in content.items() if isinstance(value, _Tensor)]
        problems += [f"{name}: a tensor beside the state_dict, not in it" for name in beside]
        content = content["state_dict"]
    for name, value in content.items():
        if isinstance(value, _Tensor) and not isinstance(name, str):
            problems.append(f"{shown(name)}: expected text as the name of a tensor")
        elif not isinstance(value, _Tensor | str | int | float | None):
            problems.append(f"{shown(name)}: expected a tensor, found a {_called(type(value))}")
    return {name: value for name, value in content.items() if isinstance(value, _Tensor)}, problems


def _open_tensor(file: WeightFile, records: dict[str, zipfile.ZipInfo], name: str, tensor: _Tensor) -> Tensor:
    """
    Raises:
      ValueError: the tensor can't be read.
    """
    dtype, storage, shape, strides = tensor.dtype, tensor.storage, tensor.shape, tensor.strides
    if dtype is None or any(tensor.flags):
        raise ValueError("expected a plain tensor, found one without dtype, conjugated or negated")
    if not is_shape(shape) or not is_shape(strides) or len(shape) != len(strides):
        raise ValueError(f"expected sizes and as many strides, found {shown(shape)} and {shown(strides)}")
    if not is_shape([tensor.offset]) or is_too_large(shape, dtype):
        raise ValueError(f"expected less than 2^63 bytes, found {shown(shape)} from {shown(tensor.offset)}")
    record = records.get(f"data/{storage.key}")
    if record is None:
        raise ValueError(f"its storage, data/{shown(storage.key)}, is not in the file")
    available = storage.count * (storage.dtype.itemsize if storage.dtype else 1)
    if available > record.file_size:
        raise ValueError(f"expected a storage of {available} bytes, found {record.file_size}")
    # From its first element to its last, with what lies between.
    count = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    count = 0 if 0 in shape else count
    end = (tensor.offset + count) * dtype.itemsize
    if end > available:
        raise ValueError(f"expected its storage to have {end} bytes, found {available}")
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes > max(file.size, _MAX_REPEATED):
        raise ValueError(f"repeats its elements to {nbytes} bytes, more than the {file.size} of the file")
    begin = _begin(file, record) + tensor.offset * dtype.itemsize

    def read() -> np.ndarray:
        elements = file.read(name, begin, (count,), dtype)
        if count == 0:
            return elements.reshape(shape)
        # The stride of a single element may be anything, even too large for NumPy.
        steps = [
            stride * dtype.itemsize if size > 1 else 0 for size, stride in zip(shape, strides, strict=True)
        ]
        return contiguous(np.ndarray(shape, dtype, elements.view(np.uint8).data, 0, steps))

    return Tensor(name, tuple(shape), dtype, str(file.path), read)
