"""Seconds over restarts, and those of steps that are done again."""

import json
import pathlib
from typing import Any

import pytest

from sg4v_jax.train.goodput import Goodput

NOTHING = dict.fromkeys(("init", "data", "step", "save", "eval", "profile"), 0.0)


def read(file: pathlib.Path) -> dict[str, Any]:
    return json.loads(file.read_text())


def test_what_a_restart_repeats_is_lost(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "goodput.json"
    run = Goodput(file, 0)
    run.write(4, NOTHING | {"init": 10.0, "step": 40.0, "data": 1.0})
    run.write(5, NOTHING | {"init": 10.0, "step": 50.0, "data": 2.0, "save": 3.0}, saved=True)
    run.write(8, NOTHING | {"init": 10.0, "step": 80.0, "data": 4.0, "save": 3.0})
    assert read(file)["goodput"] == 80 / 97
    assert list(tmp_path.iterdir()) == [file]
    # Killed; three steps are done again.
    again = Goodput(file, 5)
    assert again.seconds == NOTHING | {"init": 10.0, "step": 50.0, "data": 2.0, "save": 3.0, "lost": 32.0}
    again.write(10, NOTHING | {"init": 7.0, "step": 50.0, "save": 1.0}, saved=True)
    expected = NOTHING | {"init": 17.0, "step": 100.0, "data": 2.0, "save": 4.0, "lost": 32.0}
    state = read(file)
    assert (state["seconds"], state["starts"], state["step"]) == (expected, 2, 10)
    assert state["goodput"] == 100 / 155
    # Killed while the checkpoint of 10 was being written: it goes on from 5 once more.
    third = Goodput(file, 5)
    assert third.seconds == NOTHING | {"init": 17.0, "step": 50.0, "data": 2.0, "save": 3.0, "lost": 83.0}
    assert sum(third.seconds.values()) == sum(expected.values())
    third.write(6, NOTHING)
    assert list(read(file)["saved"]) == ["5"]


def test_without_a_checkpoint_all_is_lost_but_starting(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "goodput.json"
    Goodput(file, 0).write(3, NOTHING | {"init": 5.0, "step": 30.0, "data": 1.0, "eval": 2.0})
    assert Goodput(file, 0).seconds == NOTHING | {"init": 5.0, "lost": 33.0}
    # A finished run that is started again has nothing to do and writes nothing.
    before = file.read_bytes()
    assert Goodput(file, 3).share == 0
    assert file.read_bytes() == before


@pytest.mark.parametrize("text", ["", "{}", '{"seconds": {}}'])
def test_a_file_that_is_none(tmp_path: pathlib.Path, text: str) -> None:
    file = tmp_path / "goodput.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"goodput\.json: not what a run wrote .* remove it"):
        Goodput(file, 0)
