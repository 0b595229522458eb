"""Safetensors files against the official library, and damaged in every way."""

import io
import json
import os
import pathlib
import struct
import tracemalloc
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import deserialize
from safetensors.numpy import save

from sg4v_jax.convert import safetensors_file
from sg4v_jax.convert.safetensors_file import open_safetensors, write_safetensors
from sg4v_jax.convert.tensors import ConversionError, contiguous

F32, BF16 = np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)
DTYPES = [
    *(np.dtype(name) for name in ("bool", "uint8", "int8", "uint16", "int16", "float16", "uint32", "int32")),
    *(np.dtype(name) for name in ("float32", "uint64", "int64", "float64", "complex64")),
    *(np.dtype(getattr(ml_dtypes, name)) for name in ("bfloat16", "float8_e4m3fn", "float8_e5m2")),
]
NAMES = st.text(st.characters(exclude_categories=["Cs"])).filter(lambda name: name != "__metadata__")
SPECS = st.dictionaries(
    NAMES, st.tuples(st.lists(st.integers(0, 4), max_size=4).map(tuple), st.sampled_from(DTYPES)), max_size=5
)


def random_array(shape: tuple[int, ...], dtype: np.dtype, seed: int = 0) -> np.ndarray:
    count = int(np.prod(shape)) * dtype.itemsize
    values = np.random.default_rng(seed).integers(0, 2 if dtype == np.bool_ else 256, count, np.uint8)
    return values.view(dtype).reshape(shape)


def officially(content: bytes) -> list[tuple[str, str, list[int], bytes]]:
    """What the official library reads. Its NumPy module lacks bfloat16, what is below doesn't."""
    return [
        (name, tensor["dtype"], tensor["shape"], bytes(tensor["data"]))
        for name, tensor in deserialize(content)
    ]


def write_raw(path: pathlib.Path, header: Any, data: int | bytes) -> None:
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    body = bytes(data) if isinstance(data, int) else data
    path.write_bytes(struct.pack("<Q", len(content)) + content + body)


def entry(shape: Any, begin: Any, end: Any, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def problems_of(path: pathlib.Path) -> tuple[str, ...]:
    with pytest.raises(ConversionError) as caught:
        open_safetensors(path)
    assert all(problem.startswith(str(path)) for problem in caught.value.problems)
    assert all(len(problem) < 1000 and problem.isprintable() for problem in caught.value.problems)
    return caught.value.problems


@given(specs=SPECS, reverse=st.booleans())
@settings(deadline=None, max_examples=150)
def test_same_as_the_official_library(
    specs: dict[str, tuple[tuple[int, ...], np.dtype]],
    reverse: bool,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    path = tmp_path_factory.getbasetemp() / "official.safetensors"
    arrays = {name: random_array(*spec, seed) for seed, (name, spec) in enumerate(specs.items())}
    official = save(arrays, metadata={"format": "pt"})
    path.write_bytes(official)
    tensors = open_safetensors(path)
    assert tensors.keys() == arrays.keys()
    for name, tensor in tensors.items():
        found = tensor.read()
        assert (tensor.name, tensor.where, tensor.nbytes) == (name, str(path), found.nbytes)
        assert (tensor.shape, tensor.dtype) == (found.shape, found.dtype) == specs[name]
        assert found.flags.writeable and found.flags.c_contiguous
        assert found.tobytes() == arrays[name].tobytes()
    # In the official order the bytes are the same; in another one the official library reads them.
    order = list(tensors)
    if reverse:
        order.sort(key=lambda name: (-arrays[name].itemsize, name[::-1]))
    write_safetensors(path, [(name, *specs[name]) for name in order], (arrays[name] for name in order))
    written = path.read_bytes()
    if not reverse:
        assert written == official
    assert sorted(officially(written)) == sorted(officially(official))


VIEWS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "itself": lambda array: array,
    "transposed": lambda array: array.T,
    "two axes swapped": lambda array: array.swapaxes(0, 1),
    "columns": lambda array: array[..., 1:3],
    "every other": lambda array: array[::2, :, ::-1],
    "backwards": lambda array: array[::-1],
    "repeated": lambda array: np.broadcast_to(array[:, :1], array.shape),
    "one row": lambda array: array[None, 0].swapaxes(1, 2),
    "one axis": lambda array: array[:, 2, 1],
    "empty": lambda array: array[:, :0].T,
    "scalar": lambda array: array[1, 2, 3],
}


@pytest.mark.parametrize("chunk", [1, 100, 1 << 23])
@pytest.mark.parametrize("view", VIEWS)
def test_any_memory_layout(
    view: str, chunk: int, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(safetensors_file, "_CHUNK", chunk)
    whole = random_array((6, 17, 9), np.dtype(np.uint16)).view(BF16)
    array = np.asarray(VIEWS[view](whole))
    write_safetensors(tmp_path / "file", [("a", array.shape, BF16)], [array])
    found = officially((tmp_path / "file").read_bytes())
    assert found == [("a", "BF16", list(array.shape), array.tobytes())]
    assert contiguous(array).flags.c_contiguous and contiguous(array).tobytes() == array.tobytes()


def test_one_array_in_memory(tmp_path: pathlib.Path) -> None:
    """While writing there is one array, and of a transposed one a chunk; a read takes what it returns."""
    shape, nbytes = (4096, 6144), 4096 * 6144 * 2
    specs = [(f"layer.{number}", shape, BF16) for number in range(3)]

    def peak(run: Callable[[], Any]) -> int:
        tracemalloc.start()
        run()
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    path = tmp_path / "file"
    arrays = (np.full(shape[::-1], number, BF16).T for number in range(3))
    assert peak(lambda: write_safetensors(path, specs, arrays)) < nbytes + 1.1 * safetensors_file._CHUNK
    arrays = (np.full(shape, number, BF16) for number in range(3))
    assert peak(lambda: write_safetensors(path, specs, arrays)) < 1.01 * nbytes
    tensors = open_safetensors(path)
    assert peak(tensors["layer.2"].read) < 1.01 * nbytes
    for number in range(3):
        assert (tensors[f"layer.{number}"].read() == number).all()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"\(0 bytes\) is cut short: not even the length"),
        (b"\x02\0\0\0\0\0\0", r"\(7 bytes\) is cut short"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git-lfs pointer"),
        (struct.pack("<Q", 3) + b"{}", "is cut short or no safetensors file: .*found 3 bytes"),
        (
            struct.pack("<Q", 2**64 - 1) + b"{}",
            "expected a header of at most 100000000, found 1844674407370955",
        ),
        (struct.pack("<Q", 2) + b"[]", r"expected a JSON object, found b'\[\]'"),
        (struct.pack("<Q", 0), "expected a JSON object, found b''"),
        (struct.pack("<Q", 2) + b"{{", "damaged header: Expecting property name"),
        (struct.pack("<Q", 3) + b"{\xff}", "damaged header: 'utf-8' codec can't decode byte 0xff"),
        (struct.pack("<Q", 100_005) + b'{"a":' + b"[" * 100_000, "damaged header: maximum recursion depth"),
        (struct.pack("<Q", 5006) + b'{"a":' + b"9" * 5000 + b"}", "damaged header: Exceeds the limit"),
    ],
)
def test_no_safetensors_file(content: bytes, message: str, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(ConversionError, match=message):
        open_safetensors(path)
    assert len(problems_of(path)) == 1


def test_header_over_the_limit(tmp_path: pathlib.Path) -> None:
    with open(tmp_path / "file", "wb") as file:
        file.write(struct.pack("<Q", 100_000_001))
        file.truncate(100_000_100)  # takes no space on disk
    (problem,) = problems_of(tmp_path / "file")
    assert "expected a header of at most 100000000, found 100000001 bytes" in problem


def test_no_file(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ConversionError, match=r"missing does not exist$"):
        open_safetensors(tmp_path / "missing")
    with pytest.raises(ConversionError, match="Is a directory"):
        open_safetensors(tmp_path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ([], "a: expected a JSON object, found []"),
        ({}, "a: has no dtype, no shape, no data_offsets"),
        ({"dtype": "F32", "shape": [2]}, "a: has no data_offsets"),
        (entry([2], 0, 8, "F4"), "a: expected a dtype of BOOL, U8, "),
        (entry([2], 0, 8, ["F32"]), "found ['F32']"),
        (entry([-2], 0, 8), "a: expected a shape of at most 64 whole numbers, found [-2]"),
        (entry([2.0], 0, 8), "found [2.0]"),
        (entry([True, 2], 0, 8), "found [True, 2]"),
        (entry("2", 0, 8), "found 2"),
        (entry([2**63], 0, 8), "found [9223372036854775808]"),
        (entry([1] * 65, 0, 4), "found [1, 1, 1, 1, 1, 1, ...]"),
        (entry([2**40, 2**40], 0, 8), "is larger than anything"),
        (entry([0, 2**40, 2**40], 0, 0), "is larger than anything"),
        (entry([2], 8, 0), "a: expected data_offsets [begin, end], found [8, 0]"),
        (entry([2], -8, 0), "found [-8, 0]"),
        (entry([2], 0, 8.0), "found [0, 8.0]"),
        ({**entry([2], 0, 8), "data_offsets": [0, 4, 8]}, "found [0, 4, 8]"),
        (entry([3], 0, 8), "a: expected 12 bytes for F32 [3], found 8"),
        (entry([2], 0, 8, "F64"), "a: expected 16 bytes for F64 [2], found 8"),
    ],
)
def test_bad_entry(fields: Any, message: str, tmp_path: pathlib.Path) -> None:
    write_raw(tmp_path / "file", {"a": fields}, 8)
    (problem,) = problems_of(tmp_path / "file")
    assert message in problem


def test_misplaced_tensors(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "file"
    write_raw(path, {"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, 12)
    assert problems_of(path) == (
        f"{path} ({path.stat().st_size} bytes): b: its bytes 4 to 12 overlap those of a",
    )
    # The third lies in the first, not in the second, which ends before it.
    write_raw(path, {"a": entry([4], 0, 16), "b": entry([1], 0, 4), "c": entry([1], 8, 12)}, 16)
    assert [problem.split(": ", 1)[1] for problem in problems_of(path)] == [
        "a: its bytes 0 to 16 overlap those of b",
        "c: its bytes 8 to 12 overlap those of a",
    ]
    write_raw(path, {"a": entry([2], 0, 8), "none": entry([0], 4, 4)}, 8)
    assert "none: its bytes 4 to 4 overlap those of a" in problems_of(path)[0]
    write_raw(path, {"a": entry([2], 4, 12), "b": entry([2], 20, 28)}, 30)
    assert [problem.split(": ", 1)[1] for problem in problems_of(path)] == [
        "a: the 4 bytes before it belong to no tensor",
        "b: the 8 bytes before it belong to no tensor",
        "the 2 bytes after the last tensor belong to none",
    ]


def test_cut_short(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "file"
    header = {f"t{number}": entry([2], 8 * number, 8 * number + 8) for number in range(6)}
    write_raw(path, header, 9)
    (problem,) = problems_of(path)
    assert "): cut short: 39 bytes are missing, of t1, t2, t3 and 2 more; fetch it again" in problem


def test_every_problem_is_listed(tmp_path: pathlib.Path) -> None:
    header = {
        "a": entry([2], 0, 8),
        "b": entry([3], 8, 16),
        "c": entry([2], 4, 12),
        "d\n\ud800": entry([], 0, 4),
    }
    write_raw(tmp_path / "file", header, 16)
    found = [problem.split(": ", 1)[1] for problem in problems_of(tmp_path / "file")]
    assert found == [
        "b: expected 12 bytes for F32 [3], found 8",
        r"'d\n\ud800': its name is not Unicode",
        "c: its bytes 4 to 12 overlap those of a",
    ]


@pytest.mark.parametrize("header", [b'{"a":%s,"b":%s,"a":%s}', b'{"b":{"dtype":"F32","dtype":"F32"}}'])
def test_duplicates(header: bytes, tmp_path: pathlib.Path) -> None:
    fields = json.dumps(entry([], 0, 4)).encode()
    write_raw(tmp_path / "file", header.replace(b"%s", fields), 4)
    (problem,) = problems_of(tmp_path / "file")
    assert ("a is there twice" in problem) or ("dtype is there twice" in problem)


def test_metadata(tmp_path: pathlib.Path) -> None:
    write_raw(tmp_path / "file", {"__metadata__": {"format": "np"}, "a": entry([], 0, 4)}, 4)
    assert list(open_safetensors(tmp_path / "file")) == ["a"]
    write_raw(tmp_path / "file", {"__metadata__": {"format": 3}}, 0)
    assert "expected strings in __metadata__, found {'format': 3}" in problems_of(tmp_path / "file")[0]
    write_safetensors(tmp_path / "file", [], [], metadata={})
    assert (tmp_path / "file").read_bytes()[8:] == b"{}      "
    assert open_safetensors(tmp_path / "file") == {}


@given(position=st.integers(0, 10**6), value=st.integers(0, 255), kept=st.integers(0, 10**6))
@settings(deadline=None, max_examples=300)
def test_any_damage_is_an_error_or_harmless(
    position: int, value: int, kept: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    content = bytearray(save({"a": np.ones((2, 3), np.float32), "b": np.zeros(4, np.int8)}))
    content[position % len(content)] = value
    path = tmp_path_factory.getbasetemp() / "damaged.safetensors"
    path.write_bytes(content[: kept % (2 * len(content))])
    try:
        tensors = open_safetensors(path)
    except ConversionError:
        return
    assert sum(tensor.read().nbytes for tensor in tensors.values()) < len(content)


class SlowFile(io.FileIO):
    """Gives a few bytes at a time, and none after `end`."""

    end = 10**9

    def readinto(self, buffer: Any) -> int:
        count = max(0, min(7, self.end - self.tell(), len(buffer)))
        return super().readinto(memoryview(buffer)[:count]) or 0


def test_partial_reads(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    array = random_array((5, 5), F32)
    write_safetensors(path, [("a", (5, 5), F32)], [array])
    monkeypatch.setattr(
        safetensors_file, "open", lambda path, mode, buffering: SlowFile(path, mode), raising=False
    )
    tensor = open_safetensors(path)["a"]
    assert tensor.read().tobytes() == array.tobytes()
    monkeypatch.setattr(SlowFile, "end", path.stat().st_size - 10)
    with pytest.raises(ConversionError, match=rf"{path}: a: the file ended 10 bytes early"):
        tensor.read()


def test_a_file_that_changes(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "file"
    write_safetensors(path, [("a", (4,), F32)], [np.ones(4, F32)])
    tensor = open_safetensors(path)["a"]
    first, second = tensor.read(), tensor.read()
    first[:] = 0
    np.testing.assert_array_equal(second, np.ones(4))
    os.utime(path, ns=(0, 0))
    with pytest.raises(ConversionError, match="file: a: the file has changed while in use"):
        tensor.read()
    path.unlink()
    with pytest.raises(ConversionError, match=r"file: a: .*No such file"):
        tensor.read()


def test_no_descriptors_are_held(tmp_path: pathlib.Path) -> None:
    write_safetensors(tmp_path / "file", [("a", (4,), F32)], [np.ones(4, F32)])
    before = len(os.listdir("/dev/fd"))
    opened = [open_safetensors(tmp_path / "file") for _ in range(50)]
    assert opened[0]["a"].read().sum() == 4
    assert len(os.listdir("/dev/fd")) == before


@pytest.mark.parametrize(
    ("specs", "arrays", "message"),
    [
        ([("a", (2,), F32)], [np.ones(3, F32)], r"a: expected float32 \(2,\), found float32 \(3,\)"),
        ([("a", (2,), F32)], [np.ones(2, BF16)], r"found bfloat16 \(2,\)"),
        ([("a", (2,), F32)], [], r"a: expected float32 \(2,\), found none"),
        ([("a", (2,), F32)], [np.ones(2, F32)] * 2, "expected 1 tensors, found more"),
        ([("a", (2,), F32)] * 2, [np.ones(2, F32)] * 2, "a can't be written .* a name twice"),
        ([("__metadata__", (2,), F32)], [np.ones(2, F32)], "__metadata__ can't be written"),
        (
            [("a", (2,), np.dtype("complex128"))],
            [],
            "as complex128 at byte 0: a dtype that safetensors lacks",
        ),
        ([("a", (1,), BF16), ("b", (1,), F32)], [], "b can't be written as float32 at byte 2"),
    ],
)
def test_arrays_other_than_promised(
    specs: Any, arrays: list[np.ndarray], message: str, tmp_path: pathlib.Path
) -> None:
    with pytest.raises(ConversionError, match=message):
        write_safetensors(tmp_path / "file", specs, arrays)
