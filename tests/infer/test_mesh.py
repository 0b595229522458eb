"""Several devices give the answers of one, each holding its part of the slots and heads."""

import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from tests.conftest import TinyWorld

REPOSITORY = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def found(tiny_world: TinyWorld) -> dict[str, Any]:
    environment = {**os.environ, "PYTHONPATH": os.fspath(REPOSITORY)}
    script = REPOSITORY / "tests/infer/answer_on_devices.py"
    argv = [sys.executable, script, tiny_world.tokenizer]
    done = subprocess.run(argv, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return report


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["data=2 tensor=2 float", "data=2 tensor=2 int8"])
def test_devices_answer_like_one(mesh: str, found: dict[str, Any]) -> None:
    kv = mesh.split()[-1]
    single, several = found[f"one {kv}"], found[mesh]
    assert several["tokens"] == single["tokens"]
    assert len({tuple(tokens) for tokens in single["tokens"]}) == len(single["tokens"])
    # Products are summed in another order; a rounded key or value may then round the other way.
    tolerance = 1e-4 if kv == "float" else 0.05
    for name in ("log_probabilities", "scores"):
        np.testing.assert_allclose(several[name], single[name], atol=tolerance)
    # Three slots are rounded up to fill the devices, and every device has its part.
    assert single["local"] == 1 and several["local"] == 0.25
    assert several["slots"] == 4 and several["memory"] < 0.5 * single["memory"]
