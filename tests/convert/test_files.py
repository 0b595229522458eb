"""Damaged, missing and half-written checkpoints."""

import json
import pathlib
import stat
import sys
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from sg4v_jax.convert.files import new_directory, open_file, open_tensors, write_tensors
from sg4v_jax.convert.tensors import ConversionError

A, B = np.arange(6, dtype=np.float32).reshape(2, 3), np.ones(4, np.float32)


def write_index(directory: pathlib.Path, weight_map: dict[str, str]) -> None:
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize("kept", [0, 7, 100, -1])
def test_truncated_safetensors(kept: int, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": A, "b": B}, path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ConversionError, match=rf"{path} \(\d+ bytes\) is cut short"):
        open_tensors(tmp_path)


def test_git_lfs_pointer(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(ConversionError, match="no safetensors file"):
        open_tensors(tmp_path)


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
        "3.safetensors (4 bytes) is cut short",
        "4.safetensors does not exist",
    ):
        assert part in problems


@pytest.mark.parametrize("content", ["[]", "{", '{"weight_map": 3}'])
def test_bad_index(content: str, tmp_path: pathlib.Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ConversionError, match=r"index\.json"):
        open_tensors(tmp_path)


def test_torch_files(tmp_path: pathlib.Path) -> None:
    tensors = {"a": torch.from_numpy(A), "b": torch.from_numpy(A).bfloat16().T, "c": torch.ones(3).half()}
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    found = open_tensors(tmp_path)
    assert {name: str(array.dtype) for name, array in found.items()} == {
        "a": "float32",
        "b": "bfloat16",
        "c": "float16",
    }
    np.testing.assert_array_equal(found["a"], A)
    np.testing.assert_array_equal(found["b"].astype(np.float32), A.T)


class Evil:
    """What a pickle can do to who loads it."""

    def __reduce__(self) -> Any:
        return exec, ("import builtins; builtins.HIT = True",)


def test_torch_files_run_no_code(tmp_path: pathlib.Path) -> None:
    torch.save({"a": Evil()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ConversionError, match="can't be read as PyTorch weights"):
        open_tensors(tmp_path)
    assert not hasattr(__import__("builtins"), "HIT")


def test_torch_file_damaged(tmp_path: pathlib.Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"PK\x03\x04 and no more")
    with pytest.raises(ConversionError, match=r"pytorch_model\.bin can't be read as PyTorch weights"):
        open_tensors(tmp_path)


def test_torch_files_without_torch(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ConversionError, match=r"install PyTorch to read it \(pip install torch\)"):
        open_file(tmp_path / "pytorch_model.bin")


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


def test_weights_are_readable_by_others(tmp_path: pathlib.Path) -> None:
    """What safetensors writes is private; a checkpoint is an ordinary file."""
    (tmp_path / "ordinary").touch()
    with new_directory(tmp_path / "model", overwrite=False) as partial:
        write_tensors(partial, [("a", A)], dtype="float32")
    mode = (tmp_path / "model" / "model.safetensors").stat().st_mode
    assert stat.S_IMODE(mode) == stat.S_IMODE((tmp_path / "ordinary").stat().st_mode)


def test_dtypes(tmp_path: pathlib.Path) -> None:
    write_tensors(tmp_path, [("a", A.T), ("b", B)], dtype="bfloat16")
    found = load_file(tmp_path / "model.safetensors")
    assert {str(array.dtype) for array in found.values()} == {"bfloat16"}
    np.testing.assert_array_equal(found["a"].astype(np.float32), A.T)
    with pytest.raises(ValueError, match="'int8' is not one of bfloat16, float16, float32"):
        write_tensors(tmp_path, [("a", A)], dtype="int8")


def test_too_large_for_float16(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ConversionError, match="b has values too large for float16; use bfloat16"):
        write_tensors(tmp_path, [("a", A), ("b", 1e5 * B)], dtype="float16")
    # What is infinite already can't be blamed on the dtype.
    write_tensors(tmp_path, [("a", np.array([np.inf, np.nan], np.float32))], dtype="float16")
