"""Damaged, missing and half-written checkpoints."""

import json
import pathlib
import stat

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from sg4v_jax.convert.files import Stream, new_directory, open_tensors, write_tensors
from sg4v_jax.convert.tensors import DTYPES, ConversionError, in_memory

A, B = np.arange(6, dtype=np.float32).reshape(2, 3), np.ones(4, np.float32)


def write_index(directory: pathlib.Path, weight_map: dict[str, str]) -> None:
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_no_weights(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ConversionError, match=r"has no weights: none of model\.safetensors, "):
        open_tensors(tmp_path)


def test_every_damaged_shard_is_named(tmp_path: pathlib.Path) -> None:
    save_file({"a": A}, tmp_path / "1.safetensors")
    save_file({"b": B, "a": A}, tmp_path / "2.safetensors")
    (tmp_path / "3.safetensors").write_bytes(b"half")
    shards = {"a": "1", "b": "2", "lost": "1", "c": "3", "d": "4"}
    write_index(tmp_path, {name: f"{shard}.safetensors" for name, shard in shards.items()})
    with pytest.raises(ConversionError) as caught:
        open_tensors(tmp_path)
    problems = "\n".join(caught.value.problems)
    assert len(caught.value.problems) == 4
    for part in (
        "1.safetensors lacks lost",
        "2.safetensors and another shard have a",
        "3.safetensors (4 bytes)",
        "4.safetensors does not exist",
    ):
        assert part in problems


@pytest.mark.parametrize("content", ["[]", "{", '{"weight_map": 3}'])
def test_bad_index(content: str, tmp_path: pathlib.Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ConversionError, match=r"index\.json"):
        open_tensors(tmp_path)


def test_directory_appears_whole_or_not_at_all(tmp_path: pathlib.Path) -> None:
    target = tmp_path / "deep" / "model"

    def write(content: str, overwrite: bool, fail: bool = False) -> None:
        with new_directory(target, overwrite=overwrite) as partial:
            (partial / "file").write_text(content)
            (partial / "inner").mkdir()
            assert not (target / "inner").exists() or (target / "file").read_text() != content
            if fail:
                raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write("never", overwrite=False, fail=True)
    assert not target.exists()
    target.mkdir()  # an empty one may be there
    write("first", overwrite=False)
    with pytest.raises(FileExistsError, match="overwrite=True"):
        write("second", overwrite=False)
    with pytest.raises(OSError, match="disk full"):
        write("third", overwrite=True, fail=True)
    assert (target / "file").read_text() == "first"
    write("fourth", overwrite=True)
    assert (target / "file").read_text() == "fourth"
    assert [path.name for path in target.parent.iterdir()] == ["model"], "nothing else is left"
    with pytest.raises(FileExistsError, match="is a file"), new_directory(target / "file", overwrite=True):
        pass


def test_what_was_there_comes_back_when_the_swap_fails(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the two renames there is no directory of that name: an error or a kill there loses nothing."""
    target, rename = tmp_path / "model", pathlib.Path.rename
    target.mkdir()
    (target / "file").write_text("old")

    def fail(path: pathlib.Path, to: pathlib.Path) -> pathlib.Path:
        if path.suffix == ".partial":
            raise OSError("no")
        return rename(path, to)

    with (
        monkeypatch.context() as patch,
        pytest.raises(OSError, match="no"),
        new_directory(target, overwrite=True) as partial,
    ):
        patch.setattr(pathlib.Path, "rename", fail)
        (partial / "file").write_text("new")
    assert (target / "file").read_text() == "old"

    target.rename(tmp_path / ".model.old")  # as a kill leaves it
    with pytest.raises(RuntimeError, match="later"), new_directory(target, overwrite=True):
        raise RuntimeError("later")
    assert (target / "file").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_what_a_killed_process_left_goes_away(tmp_path: pathlib.Path) -> None:
    target = tmp_path / "model"
    left = tmp_path / ".model.partial"
    (left / "inner").mkdir(parents=True)
    (left / "inner" / "half").write_text("")
    with new_directory(target, overwrite=False) as partial:
        assert not any(partial.iterdir())
        (partial / "file").write_text("whole")
        with (
            pytest.raises(FileExistsError, match="being written by another process"),
            new_directory(target, overwrite=False),
        ):
            pass
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert [path.name for path in target.iterdir()] == ["file"]


def test_weights_are_readable_by_others(tmp_path: pathlib.Path) -> None:
    (tmp_path / "ordinary").touch()
    with new_directory(tmp_path / "model", overwrite=False) as partial:
        write_tensors(partial, [in_memory("a", A)], Stream())
    mode = (tmp_path / "model" / "model.safetensors").stat().st_mode
    assert stat.S_IMODE(mode) == stat.S_IMODE((tmp_path / "ordinary").stat().st_mode)


def test_casts(tmp_path: pathlib.Path) -> None:
    tensors = [in_memory("a", A.T).cast(DTYPES["bfloat16"]), in_memory("b", B).cast(DTYPES["float16"])]
    write_tensors(tmp_path, tensors, Stream())
    found = load_file(tmp_path / "model.safetensors")
    assert {name: str(array.dtype) for name, array in found.items()} == {"a": "bfloat16", "b": "float16"}
    np.testing.assert_array_equal(found["a"].astype(np.float32), A.T)


def test_too_large_for_float16() -> None:
    with pytest.raises(ConversionError, match="b has values too large for float16; use bfloat16"):
        in_memory("b", 1e5 * B).cast(DTYPES["float16"]).read()
    # What is infinite already can't be blamed on the dtype.
    strange = np.array([np.inf, np.nan], np.float32)
    np.testing.assert_array_equal(in_memory("c", strange).cast(DTYPES["float16"]).read(), strange)


@pytest.mark.parametrize("dtype", DTYPES)
def test_not_finite(dtype: str, tmp_path: pathlib.Path) -> None:
    """Every tensor that has such values is named; the count is of values, and large ones pass."""
    fine = np.array([3e4, -3e4, 0, -0.0, 1e-7], DTYPES[dtype])
    strange = np.array([[1, np.nan, np.inf], [-np.inf, 2, 3]], DTYPES[dtype])
    tensors = [in_memory("a", fine), in_memory("b", strange.T), in_memory("c", fine), in_memory("d", strange)]
    stream = Stream()
    write_tensors(tmp_path, tensors, stream)
    with pytest.raises(ConversionError) as caught:
        stream.finish()
    assert [problem.split(" in ")[0] for problem in caught.value.problems[:-1]] == ["b", "d"]
    assert all("3 values are NaN or infinite" in problem for problem in caught.value.problems[:-1])
    lenient = Stream(allow_not_finite=True)
    write_tensors(tmp_path, tensors, lenient)
    lenient.finish()


def test_shards_outside_the_directory_are_refused(tmp_path: pathlib.Path) -> None:
    save_file({"a": A}, tmp_path / "1.safetensors")
    (tmp_path / "model").mkdir()
    write_index(tmp_path / "model", {"a": "../1.safetensors", "b": "/etc/passwd"})
    with pytest.raises(ConversionError) as caught:
        open_tensors(tmp_path / "model")
    assert [problem.split("'")[1] for problem in caught.value.problems] == ["../1.safetensors", "/etc/passwd"]
