"""A file is what it was, or all of what was written."""

import os
import pathlib

import pytest

from sg4v_jax import atomic
from tests.disk import small_files


def test_text_and_bytes(tmp_path: pathlib.Path) -> None:
    atomic.write(tmp_path / "file", "caf\u00e9")
    assert (tmp_path / "file").read_bytes() == b"caf\xc3\xa9"
    atomic.write(os.fspath(tmp_path / "file"), b"shorter")
    assert (tmp_path / "file").read_bytes() == b"shorter"
    assert os.listdir(tmp_path) == ["file"]
    (tmp_path / "usual").touch()
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_a_full_disk(tmp_path: pathlib.Path) -> None:
    atomic.write(tmp_path / "file", "{}")
    with small_files(1000), pytest.raises(OSError, match=r"File too large: .*/file'"):
        atomic.write(tmp_path / "file", b"x" * 2000)
    assert os.listdir(tmp_path) == ["file"]
    assert (tmp_path / "file").read_text() == "{}"


def test_a_block_that_raises(tmp_path: pathlib.Path) -> None:
    atomic.write(tmp_path / "file", "before")
    with pytest.raises(KeyError), atomic.replacing(tmp_path / "file") as file:
        file.write(b"half")
        assert (tmp_path / "file").read_text() == "before"
        raise KeyError
    assert os.listdir(tmp_path) == ["file"]
    assert (tmp_path / "file").read_text() == "before"


def test_no_such_directory(tmp_path: pathlib.Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"No such file or directory: .*/none/"):
        atomic.write(tmp_path / "none" / "file", "")
