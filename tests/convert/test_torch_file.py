"""PyTorch's files against PyTorch, and files made to do harm."""

import collections
import io
import os
import pathlib
import pickle
import re
import struct
import sys
import tarfile
import tracemalloc
import warnings
import zipfile
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sg4v_jax.convert.tensors import ConversionError
from sg4v_jax.convert.torch_file import open_torch

TORCH_DTYPES = [
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128),
    *(torch.bool, torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.uint8, torch.uint16, torch.uint32, torch.uint64),
    *(torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz),
]


def random_tensor(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    if dtype == torch.bool:
        return torch.randint(0, 2, shape).bool()
    count = torch.empty(shape, dtype=dtype).nbytes
    return torch.randint(0, 256, (count,), dtype=torch.uint8).view(dtype).reshape(shape)


def bytes_of(tensor: torch.Tensor) -> bytes:
    return (
        tensor.detach()
        .clone(memory_format=torch.contiguous_format)
        .reshape(-1)
        .view(torch.uint8)
        .numpy()
        .tobytes()
    )


def assert_same(path: pathlib.Path, expected: dict[str, torch.Tensor]) -> None:
    tensors = open_torch(path)
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        array = tensor.read()
        assert (tensor.name, tensor.where, tensor.nbytes) == (name, str(path), array.nbytes)
        assert tensor.shape == array.shape == tuple(expected[name].shape)
        assert tensor.dtype == array.dtype == str(expected[name].dtype).removeprefix("torch.")
        assert array.tobytes() == bytes_of(expected[name]), name
        assert array.flags.writeable and array.flags.c_contiguous


def problems_of(path: pathlib.Path) -> tuple[str, ...]:
    with pytest.raises(ConversionError) as caught:
        open_torch(path)
    assert all(problem.startswith(str(path)) for problem in caught.value.problems)
    assert all(len(problem) < 1000 and problem.isprintable() for problem in caught.value.problems)
    return caught.value.problems


def write_archive(path: pathlib.Path, program: bytes, **storages: bytes) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", program)
        for key, content in storages.items():
            archive.writestr(f"archive/data/{key.removeprefix('_')}", content)


class Storage:
    """Pickled as a persistent identity, which PyTorch says a storage with."""

    def __init__(self, *identity: Any):
        self.identity = identity if len(identity) != 1 else identity[0]


class Reduced:
    """Pickled as a call, then what is done to its result: state, items, keys and values."""

    def __init__(self, *reduced: Any):
        self._reduced = reduced

    def __reduce__(self) -> Any:
        return tuple(iter(part) if isinstance(part, list) else part for part in self._reduced)


def described(content: Any, protocol: int = 2) -> bytes:
    class Pickler(pickle.Pickler):
        def persistent_id(self, value: Any) -> Any:
            return value.identity if isinstance(value, Storage) else None

    buffer = io.BytesIO()
    Pickler(buffer, protocol).dump(content)
    return buffer.getvalue()


def tensor(
    *,
    key: str = "0",
    size: int = 4,
    offset: Any = 0,
    shape: Any = (4,),
    strides: Any = (1,),
    kind: Any = torch.FloatStorage,
    flags: tuple[Any, ...] = (),
) -> Reduced:
    """What PyTorch writes for a tensor."""
    storage = Storage("storage", kind, key, "cpu", size)
    arguments = (storage, offset, shape, strides, False, collections.OrderedDict(), *flags)
    return Reduced(torch._utils._rebuild_tensor_v2, arguments)


# What PyTorch writes.


@pytest.mark.parametrize("dtype", TORCH_DTYPES, ids=str)
def test_dtypes(dtype: torch.dtype, tmp_path: pathlib.Path) -> None:
    expected = {
        "matrix": random_tensor(dtype, 3, 5),
        "scalar": random_tensor(dtype),
        "t": random_tensor(dtype, 4, 2).T,
    }
    torch.save(expected, tmp_path / "file")
    assert_same(tmp_path / "file", expected)


@pytest.mark.parametrize("protocol", [1, 2, 3, 4, 5])
def test_protocols(protocol: int, tmp_path: pathlib.Path) -> None:
    expected = {f"layer.{number}": random_tensor(torch.float32, 3, number) for number in range(300)}
    numbers = {
        "a": 2**70,
        "b": -1,
        "c": 1.5,
        "d": None,
        "e": True,
        "f": "é" * 300,
        "g": 70_000,
        "h": 3,
        "i": 300,
    }
    torch.save({**expected, **numbers}, tmp_path / "file", pickle_protocol=protocol)
    assert_same(tmp_path / "file", expected)


def test_modules(tmp_path: pathlib.Path) -> None:
    """State dicts with versions as an attribute, Parameters, some with attributes, and tied ones."""
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    torch.save(module.state_dict(), tmp_path / "file")
    assert_same(tmp_path / "file", dict(module.state_dict()))
    tied = torch.nn.Parameter(random_tensor(torch.bfloat16, 3, 5).nan_to_num())
    tied.is_tied = True
    parameters = collections.OrderedDict(a=tied, b=tied, c=tied.detach()[1:], none=None, epoch=3)
    torch.save(parameters, tmp_path / "file")
    assert_same(tmp_path / "file", {name: parameters[name] for name in "abc"})
    torch.save({"state_dict": module.state_dict(), "optimizer": {"lr": [1e-3]}}, tmp_path / "file")
    assert_same(tmp_path / "file", dict(module.state_dict()))


@given(data=st.data(), dtype=st.sampled_from([torch.bfloat16, torch.float32, torch.int8]))
@settings(deadline=None, max_examples=150)
def test_views(data: st.DataObject, dtype: torch.dtype, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Transposed, sliced, expanded and overlapping: any strides that PyTorch allows."""
    storage = random_tensor(dtype, 64)
    shape = data.draw(st.lists(st.integers(0, 4), max_size=4))
    strides = [data.draw(st.integers(0, 70 if size < 2 else 64 // (4 * size))) for size in shape]
    span = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True)) + 1
    offset = data.draw(st.integers(0, 64 - (0 if 0 in shape else span)))
    expected = {"view": torch.as_strided(storage, shape, strides, offset), "storage": storage}
    path = tmp_path_factory.getbasetemp() / "views.bin"
    torch.save(expected, path)
    assert_same(path, expected)


def test_large_transposed(tmp_path: pathlib.Path) -> None:
    expected = {
        "t": torch.arange(3000 * 1031, dtype=torch.float32).reshape(3000, 1031).T,
        "heads": torch.ones(0),
    }
    expected["heads"] = expected["t"][:1024].reshape(8, 128, 3000).transpose(0, 1)
    torch.save(expected, tmp_path / "file")
    assert_same(tmp_path / "file", expected)


def test_zip64(tmp_path: pathlib.Path) -> None:
    """Records of more than 4 GiB, and beyond; what isn't written takes no space on disk."""
    large = 5 * 2**30
    content = {
        "first": tensor(key="0", size=large // 4, offset=large // 4 - 3, shape=(3,)),
        "last": tensor(key="1"),
    }
    with open(tmp_path / "file", "wb") as file, zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data/0", b"")
        file.seek(large - 12, os.SEEK_CUR)
        file.write(np.arange(3, dtype=np.float32).tobytes())
        record = archive.getinfo("archive/data/0")
        record.file_size = record.compress_size = large
        archive.start_dir = file.tell()
        archive.writestr("archive/data/1", np.arange(4, dtype=np.float32).tobytes())
        archive.writestr("archive/data.pkl", described(content))
    tensors = open_torch(tmp_path / "file")
    np.testing.assert_array_equal(tensors["first"].read(), [0, 1, 2])
    np.testing.assert_array_equal(tensors["last"].read(), [0, 1, 2, 3])


def test_only_the_tensor_is_read(tmp_path: pathlib.Path) -> None:
    """A view takes what lies between its first element and its last, not its whole storage."""
    whole = torch.zeros(2**24)
    torch.save({"view": whole[5000:6000], "whole": whole}, tmp_path / "file")
    tensors = open_torch(tmp_path / "file")
    tracemalloc.start()
    tensors["view"].read()
    assert tracemalloc.get_traced_memory()[1] < 2**17
    tensors["whole"].read()
    assert tracemalloc.get_traced_memory()[1] < 1.01 * whole.nbytes
    tracemalloc.stop()


# Tensors that don't lie within their file.


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"shape": (5,)}, "expected its storage to have 20 bytes, found 16"),
        ({"offset": 1}, "expected its storage to have 20 bytes, found 16"),
        ({"strides": (2,)}, "expected its storage to have 28 bytes, found 16"),
        ({"shape": (0,), "offset": 5}, "expected its storage to have 20 bytes, found 16"),
        ({"size": 5}, "expected a storage of 20 bytes, found 16"),
        ({"size": 2**80}, f"expected a storage of {2**82} bytes, found 16"),
        ({"size": 3}, "expected its storage to have 16 bytes, found 12"),
        ({"key": "7"}, "its storage, data/7, is not in the file"),
        ({"key": "../data.pkl"}, "its storage, data/../data.pkl, is not in the file"),
        ({"offset": -1}, "expected less than 2^63 bytes, found (4,) from -1"),
        ({"offset": 2**63}, "from 9223372036854775808"),
        ({"offset": 0.0}, "from 0.0"),
        ({"shape": (-4,)}, "expected sizes and as many strides, found (-4,) and (1,)"),
        ({"strides": (-1,)}, "found (4,) and (-1,)"),
        ({"strides": (1, 1)}, "found (4,) and (1, 1)"),
        ({"shape": (True,)}, "found (True,) and (1,)"),
        ({"shape": 4}, "found 4 and (1,)"),
        ({"shape": (1,) * 65, "strides": (1,) * 65}, "found (1, 1, 1, 1, 1, 1, ...) and"),
        ({"shape": (2**62, 2**62), "strides": (0, 0)}, "expected less than 2^63 bytes"),
        ({"shape": (2**62, 0, 2**62), "strides": (1, 1, 1)}, "expected less than 2^63 bytes"),
        ({"shape": (2**40,), "strides": (0,)}, "repeats its elements to 4398046511104 bytes, more than the"),
        (
            {"flags": ({"conj": True},)},
            "expected a plain tensor, found one without dtype, conjugated or negated",
        ),
        ({"kind": torch.UntypedStorage}, "expected a plain tensor, found one without dtype"),
    ],
    ids=str,
)
def test_tensors_out_of_bounds(wrong: dict[str, Any], message: str, tmp_path: pathlib.Path) -> None:
    write_archive(tmp_path / "file", described({"a": tensor(**wrong), "b": tensor()}), _0=bytes(16))
    (problem,) = problems_of(tmp_path / "file")
    assert problem.startswith(f"{tmp_path / 'file'}: a: ") and message in problem


def test_strides_that_do_not_matter(tmp_path: pathlib.Path) -> None:
    content = {
        "one": tensor(shape=(1, 4), strides=(2**62, 1)),
        "none": tensor(shape=(3, 0), strides=(2**62, 2**62)),
    }
    write_archive(tmp_path / "file", described(content), _0=np.arange(4, dtype=np.float32).tobytes())
    tensors = open_torch(tmp_path / "file")
    np.testing.assert_array_equal(tensors["one"].read(), [[0, 1, 2, 3]])
    assert tensors["none"].read().shape == (3, 0)


def test_every_problem_is_listed(tmp_path: pathlib.Path) -> None:
    content = {
        "a": tensor(offset=1),
        "b": tensor(),
        "c": [tensor()],
        "d": {"e": tensor()},
        3: tensor(),
        "f\n": (1,),
    }
    write_archive(tmp_path / "file", described(content), _0=bytes(16))
    assert [problem.split(": ", 1)[1] for problem in problems_of(tmp_path / "file")] == [
        "c: expected a tensor, found a list",
        "d: expected a tensor, found a dict",
        "3: expected text as the name of a tensor",
        r"'f\n': expected a tensor, found a tuple",
        "a: expected its storage to have 20 bytes, found 16",
    ]
    write_archive(tmp_path / "file", described({"state_dict": {"a": tensor()}, "b": tensor()}), _0=bytes(16))
    assert "b: a tensor beside the state_dict, not in it" in problems_of(tmp_path / "file")[0]
    write_archive(tmp_path / "file", described(tensor()), _0=bytes(16))
    assert "expected a dict of tensors, found a Tensor" in problems_of(tmp_path / "file")[0]


# Archives that PyTorch doesn't write.


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "(0 bytes) is cut short or no PyTorch file; fetch it again"),
        (b"PK\x03\x04 and no more", "is cut short or damaged; fetch it again (File is not a zip file)"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "is a git-lfs pointer"),
        (b"\x93NUMPY", "no PyTorch file"),
    ],
)
def test_no_torch_file(content: bytes, message: str, tmp_path: pathlib.Path) -> None:
    (tmp_path / "file").write_bytes(content)
    (problem,) = problems_of(tmp_path / "file")
    assert message in problem


def test_older_formats(tmp_path: pathlib.Path) -> None:
    torch.save({"a": torch.ones(3)}, tmp_path / "file", _use_new_zipfile_serialization=False)
    assert "before 1.6; load and save it with a current PyTorch" in problems_of(tmp_path / "file")[0]
    with tarfile.open(tmp_path / "file", "w") as archive:
        archive.addfile(tarfile.TarInfo("storages"))
    assert "before 1.6" in problems_of(tmp_path / "file")[0]


def test_script_modules(tmp_path: pathlib.Path) -> None:
    with warnings.catch_warnings(action="ignore"):
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "file")
    assert "asks for __torch__." in problems_of(tmp_path / "file")[0]


def resaved(path: pathlib.Path, change: Callable[[zipfile.ZipInfo], None]) -> None:
    """The archive of a tensor, with what `change` does to its records."""
    torch.save({"a": torch.ones(300)}, path.with_suffix(".original"))
    with zipfile.ZipFile(path.with_suffix(".original")) as old, zipfile.ZipFile(path, "w") as new:
        for info in old.infolist():
            content = old.read(info)
            change(info)
            new.writestr(info, content)


def test_compressed(tmp_path: pathlib.Path) -> None:
    def compress(info: zipfile.ZipInfo) -> None:
        if "data/0" in info.filename:
            info.compress_type = zipfile.ZIP_DEFLATED

    resaved(tmp_path / "file", compress)
    (problem,) = problems_of(tmp_path / "file")
    assert "a: record file/data/0 is compressed or encrypted, as PyTorch's never are" in problem


def test_encrypted(tmp_path: pathlib.Path) -> None:
    write_archive(tmp_path / "file", described({"a": tensor()}), _0=bytes(16))
    content = bytearray((tmp_path / "file").read_bytes())
    content[content.index(b"PK\x01\x02") + 8] |= 1
    (tmp_path / "file").write_bytes(content)
    assert "record archive/data.pkl is compressed or encrypted" in problems_of(tmp_path / "file")[0]


def test_records_twice(tmp_path: pathlib.Path) -> None:
    with warnings.catch_warnings(action="ignore"):
        write_archive(tmp_path / "file", described({}), _0=bytes(16), **{"0": bytes(16)})
    assert "has two records archive/data/0" in problems_of(tmp_path / "file")[0]


def test_two_or_no_pickles(tmp_path: pathlib.Path) -> None:
    with zipfile.ZipFile(tmp_path / "file", "w") as archive:
        archive.writestr("a/b/data.pkl", described({}))
    assert "expected one data.pkl, found 0" in problems_of(tmp_path / "file")[0]
    with zipfile.ZipFile(tmp_path / "file", "w") as archive:
        archive.writestr("a/data.pkl", described({}))
        archive.writestr("b/data.pkl", described({}))
    assert "expected one data.pkl, found 2" in problems_of(tmp_path / "file")[0]


def test_records_elsewhere(tmp_path: pathlib.Path) -> None:
    write_archive(tmp_path / "file", described({"a": tensor()}), _0=bytes(16))
    content = (tmp_path / "file").read_bytes()
    (tmp_path / "file").write_bytes(content.replace(b"archive/data/0", b"archive/data/1", 1))
    assert (
        "a: record archive/data/0 is not where the archive's directory says"
        in problems_of(tmp_path / "file")[0]
    )
    # Its directory promises more bytes than there are.
    entry = content.index(b"PK\x01\x02", content.index(b"PK\x01\x02") + 4)
    longer = content[: entry + 20] + struct.pack("<LL", 5000, 5000) + content[entry + 28 :]
    (tmp_path / "file").write_bytes(longer)
    assert "a: record archive/data/0 ends " in problems_of(tmp_path / "file")[0]


def test_big_endian(tmp_path: pathlib.Path) -> None:
    write_archive(tmp_path / "file", described({"a": tensor()}), _0=bytes(16))
    with zipfile.ZipFile(tmp_path / "file", "a") as archive:
        archive.writestr("archive/byteorder", "big")
    assert "byteorder: expected little" in problems_of(tmp_path / "file")[0]


def test_large_pickle(tmp_path: pathlib.Path) -> None:
    write_archive(tmp_path / "file", bytes(2**24 + 1))
    assert "data.pkl: expected at most 16777216 bytes, found 16777217" in problems_of(tmp_path / "file")[0]


@given(position=st.integers(0, 10**6), value=st.integers(0, 255), kept=st.integers(0, 10**6))
@settings(deadline=None, max_examples=400)
def test_any_damage_is_an_error_or_harmless(
    position: int, value: int, kept: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    buffer = io.BytesIO()
    torch.save({"a": torch.ones(2, 3).T, "b": torch.zeros(4, dtype=torch.uint16)}, buffer)
    content = bytearray(buffer.getvalue())
    content[position % len(content)] = value
    path = tmp_path_factory.getbasetemp() / "damaged.bin"
    path.write_bytes(content[: kept % (8 * len(content))])
    try:
        tensors = open_torch(path)
    except ConversionError:
        return
    assert all(found.read().nbytes < 2**20 for found in tensors.values())


# Pickles made to do harm.

HARMFUL = {
    "os.system": (Reduced(os.system, ("touch hit",)), "asks for posix.system, which no state dict needs"),
    "exec": (Reduced(exec, ("open('hit', 'w')",)), "asks for .*builtin.*exec"),
    "eval": (Reduced(eval, ("open('hit', 'w')",)), "asks for .*builtin.*eval"),
    "getattr": (Reduced(getattr, ("", "join")), "asks for .*builtin.*getattr"),
    "open": (Reduced(open, ("hit", "w")), r"asks for .*io\.open"),
    "numpy": (np.ones(3), "asks for numpy"),
    "bytes": (b"\xff\xfe", "asks for _codecs.encode|no state dict has the opcode SHORT_BINBYTES"),
    "class": (Reduced, "asks for .*Reduced"),
    "load": (Reduced(torch.load, ("file",)), "asks for torch.serialization.load"),
    "set": ({1, 2}, "asks for .*set|no state dict has the opcode EMPTY_SET"),
    "complex": (1j, "asks for .*complex"),
    "device": (torch.device("cpu"), "asks for torch.device"),
    "sparse": (torch.eye(2).to_sparse(), "asks for torch._utils._rebuild_sparse_tensor"),
    "arguments": (
        Reduced(torch._utils._rebuild_tensor_v2, (1, 2)),
        r"_rebuild_tensor_v2 with what it does not take",
    ),
    "parameter": (
        Reduced(torch._utils._rebuild_parameter, ("a", 2, 3)),
        "calls torch._utils._rebuild_parameter with",
    ),
    "size": (Reduced(torch.Size, ([1],)), "calls torch.Size with"),
    "pairs": (Reduced(collections.OrderedDict, ([["a", 1]],)), "calls collections.OrderedDict with"),
    "state": (Reduced(torch.Size, ((1,),), {"__class__": 1}), "expected a dict, found a tuple"),
    "items": (Reduced(torch.Size, ((1,),), None, [1]), "expected a list, found a tuple"),
    "keys": (Reduced(torch.Size, ((1,),), None, None, [(1, 1)]), "expected a dict, found a tuple"),
    "identity": (Storage(3, 4), "expected the type, key, device and length of a storage"),
    "identity of a function": (Storage("storage", torch.Size, "0", "cpu", 1), "expected the type, key"),
    "identity without key": (Storage("storage", torch.FloatStorage, 0, "cpu", 1), "expected the type, key"),
    "negative length": (Storage("storage", torch.FloatStorage, "0", "cpu", -1), "expected the type, key"),
}


def text(value: str) -> bytes:
    return b"X" + struct.pack("<L", len(value)) + value.encode()


NEST = 200_000
PROGRAMS = {
    "INST": (b"(ios\nsystem\n.", "no state dict has the opcode INST"),
    "OBJ": (b"(ccollections\nOrderedDict\no.", "no state dict has the opcode OBJ"),
    "NEWOBJ": (b"ccollections\nOrderedDict\n)\x81.", "no state dict has the opcode NEWOBJ"),
    "EXT1": (b"\x82\x01.", "no state dict has the opcode EXT1"),
    "PERSID": (b"P0\n.", "no state dict has the opcode PERSID"),
    "a name with a dot": (
        text("torch") + text("_utils.os.system") + b"\x93.",
        "asks for torch._utils.os.system",
    ),
    "a module with a space": (text("torch x") + text("Size") + b"\x93.", "asks for torch.x.Size"),
    "a submodule": (b"ctorch\n_utils._rebuild_tensor_v2\n.", "asks for torch._utils._rebuild_tensor_v2"),
    "names of numbers": (b"K\x01K\x02\x93.", "expected a str, found a int"),
    "a name with escapes": (b"cos\n\x1b[2Jsystem\n.", r"asks for 'os.\\x1b\[2Jsystem'"),
    "BUILD of a function": (
        b"ctorch\nSize\n}" + text("__code__") + b"K\x01sb.",
        "expected a dict, found a Function",
    ),
    "BUILD of a type": (b"ctorch\nFloatStorage\n}b.", "expected a dict, found a StorageType"),
    "a call of a type": (b"ctorch\nFloatStorage\n)R.", "expected a Function, found a StorageType"),
    "a call of a dtype": (b"ctorch\nfloat32\n)R.", "expected a Function, found a Float32DType"),
    "a call of text": (text("os.system") + b")R.", "expected a Function, found a str"),
    "a call without a tuple": (b"ctorch\nSize\n}R.", "expected a tuple, found a dict"),
    "itself": (b"}q\0" + text("a") + b"h\0s.", "a: expected a tensor, found a dict"),
    "deep": (b"]" * NEST + b"a" * (NEST - 1) + b".", "expected a dict of tensors, found a list"),
    # Python doesn't remember the hash of a tuple: this one takes 2^100 steps.
    "a key without end": (b"}K\1" + b"q\0h\0\x86" * 100 + b"K\1s.", "the key .* is there twice, or neither"),
    "a key twice": (b"}" + 2 * (text("a") + b"K\1s") + b".", "the key a is there twice"),
    "keys and a value": (b"}(K\1u.", r"zip\(\) argument 2 is shorter"),
    "unmade": (b"h\x05.", "at byte 0: damaged: it uses what isn't there"),
    "no stack": (b"\x80\x02R.", "at byte 2: damaged: it uses what isn't there"),
    "text of protocol 0": (b"(lp0\n.", "no state dict has the opcode LIST"),
    "no mark": (b"}u.", "damaged: it uses what isn't there"),
    "short tuple": (b"K\1\x87.", "damaged: it uses what isn't there"),
    "nothing": (b"", "pickle exhausted before seeing STOP"),
    "no end": (b"\x80\x02}", "pickle exhausted before seeing STOP"),
    "no content": (b".", "not enough values to unpack"),
    "two contents": (b"}}.", "too many values to unpack"),
    "no opcode": (b"\xff.", "opcode b'.xff' unknown"),
    "long text": (b"\x8d" + struct.pack("<Q", 2**62) + b"a", "expected 4611686018427387904 bytes"),
    "longer text": (b"\x8d" + struct.pack("<Q", 2**64 - 1) + b"a", "byte count > sys.maxsize"),
    "long bytes": (b"\x8e" + struct.pack("<Q", 2**62) + b"a", "expected 4611686018427387904 bytes"),
    "long number": (b"\x8b" + struct.pack("<L", 2**31 - 1) + b"a", "not enough data in stream"),
    "many digits": (b"L" + b"9" * 5000 + b"L\n.", "Exceeds the limit"),
}

_watched: list[tuple[str, Any]] | None = None


@sys.addaudithook
def _watch(event: str, arguments: Any) -> None:
    """What Python itself reports of imports, code, processes and files; hooks can't be taken away."""
    if _watched is not None:
        _watched.append((event, arguments))


@pytest.fixture
def problem_of(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[bytes], str]]:
    """What is wrong with a pickle; asserts that nothing happens but that its file is read."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "file"

    def problem_of(program: bytes) -> str:
        global _watched
        write_archive(path, program, _0=bytes(16))
        _watched = []
        try:
            (problem,) = problems_of(path)
        finally:
            events, _watched = _watched, None
        opened = {(os.fspath(arguments[0]), arguments[1]) for event, arguments in events if event == "open"}
        assert opened == {(str(path), "r")}
        assert {event for event, _ in events} <= {"open", "object.__getattr__"}
        assert [*tmp_path.iterdir()] == [path]
        return problem

    yield problem_of


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("name", HARMFUL)
def test_harmful_objects(name: str, protocol: int, problem_of: Callable[[bytes], str]) -> None:
    content, message = HARMFUL[name]
    for wrapped in (content, {"a": content}, {"a": tensor(), "b": [(content,)]}, tensor(shape=[content])):
        assert re.search(f"data.pkl at byte [0-9]+: .*({message})", problem_of(described(wrapped, protocol)))


@pytest.mark.parametrize("name", PROGRAMS)
def test_harmful_programs(name: str, problem_of: Callable[[bytes], str]) -> None:
    program, message = PROGRAMS[name]
    assert re.search(message, problem_of(program))


def test_states_and_memos_change_nothing(tmp_path: pathlib.Path) -> None:
    state = b"ccollections\nOrderedDict\n)R}" + text("keys") + b"ctorch\nSize\nsb."
    memo = b"}r\xff\xff\xff\xff."
    frame = b"\x80\x04\x95" + struct.pack("<Q", 2**62) + b"}."
    tracemalloc.start()
    for program in (state, memo, frame):
        write_archive(tmp_path / "file", program)
        assert open_torch(tmp_path / "file") == {}
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


def test_messages_stay_short(tmp_path: pathlib.Path) -> None:
    """A list that holds the one before twice, and so on, has 2^100 elements when it is shown."""
    nested: list[Any] = []
    for _ in range(100):
        nested = [nested, nested]
    content = {
        "a": tensor(shape=nested),
        "b": tensor(strides=nested),
        "c": tensor(offset=nested),
        "d" * 5000: nested,
    }
    write_archive(tmp_path / "file", described(content), _0=bytes(16))
    assert len(problems_of(tmp_path / "file")) == 4


PIECES = [bytes([opcode]) for opcode in b"().012NQR\x80\x81\x85\x86\x87\x88\x89\x93\x94abdelstu]}"]
PIECES += [
    b"K\1",
    b"h\0",
    b"q\0",
    b"J\xff\xff\xff\xff",
    text("0"),
    text("cpu"),
    text("storage"),
    b"}" + text("a"),
]
PIECES += [b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch\nFloatStorage\n", b"ccollections\nOrderedDict\n"]


@given(st.lists(st.sampled_from(PIECES), max_size=30).map(b"".join) | st.binary(max_size=30))
@settings(deadline=None, max_examples=500)
def test_any_program_is_an_error_or_harmless(
    tmp_path_factory: pytest.TempPathFactory, program: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "program.bin"
    write_archive(path, program + b".", _0=bytes(16))
    try:
        tensors = open_torch(path)
    except ConversionError as error:
        assert all(problem.startswith(str(path)) for problem in error.problems)
    else:
        assert all(found.read().nbytes < 2**20 for found in tensors.values())
