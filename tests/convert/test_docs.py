"""docs/convert.md: its commands run, its table is that of the tests, its messages are real."""

import os
import pathlib
import re
import shlex
from typing import Any

import pytest

from sg4v_jax.__main__ import main
from sg4v_jax.convert.load import convert, open_checkpoint
from tests.convert.hostile import listing
from tests.convert.sources import SOURCES

DOCS = (pathlib.Path(__file__).parents[2] / "docs/convert.md").read_text()
# What the page calls a directory, and what it is here.
NAMES = {
    "ShareGPT4V-7B": "share4v, tower by config.json",
    "runs/sft": "training run",
    "lora": "LoRA on share4v",
}


def commands() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", DOCS, re.DOTALL)
    return "".join(blocks).replace("\\\n", "").splitlines()


@pytest.mark.slow
def test_commands(source: Any, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In their order, in a directory with what they name."""
    monkeypatch.chdir(tmp_path)
    os.mkdir("runs")
    for name, known in NAMES.items():
        os.symlink(source(known).path, name)
    os.symlink(source(NAMES["ShareGPT4V-7B"]).path.parent / "tower", "ShareGPT4V-7B-vit")
    start = source("Vicuna + CLIP + mm_projector.bin").path.parent
    for name in ("vicuna", "clip", "mm_projector.bin"):
        os.symlink(start / name, name)
    assert len(commands()) == 8
    for command in commands():
        program, *argv = shlex.split(command)
        assert program == "sg4v"
        main(argv)
        for output in (argv[i + 1] for i, word in enumerate(argv) if word == "--output"):
            open_checkpoint(output).checked()


def test_table() -> None:
    rows = [line for line in DOCS.splitlines() if line.endswith("| ✓ | ✓ | ✓ |")]
    assert rows == [f"| {name} | ✓ | ✓ | ✓ |" for name in SOURCES]


def test_messages(tokenizer_file: pathlib.Path) -> None:
    """As `python -m tests.convert.hostile` prints them, but for sizes of files."""

    def without_sizes(text: str) -> str:
        return re.sub(r"\d{4,}", "N", text).strip()

    (block,) = re.findall(r"```text\n(.*?)```", DOCS, re.DOTALL)
    assert without_sizes(listing(tokenizer_file)) == without_sizes(block)


def test_converting_twice_is_refused(source: Any, tmp_path: pathlib.Path) -> None:
    """By the library as by the command."""
    opened = open_checkpoint(source("HF, names of the Hub").path)
    convert(opened, tmp_path / "out", layout="hf")
    with pytest.raises(FileExistsError, match="overwrite=True"):
        convert(opened, tmp_path / "out", layout="hf")
