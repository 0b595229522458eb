"""SIGTERM: the step is saved, the run exits, and what goes on from there ends with the same bits.

Two processes, of which one is told, are in tests/launch/test_story.py.
"""

import os
import pathlib
import signal
from typing import Any

import numpy as np
import pytest

from sg4v_jax.convert.orbax import CHECKPOINTS
from sg4v_jax.train import loop
from sg4v_jax.train.preemption import EXIT_CODE, Preempted, PreemptionNotice
from tests.conftest import TinyWorld
from tests.train.test_resume import STEPS, logged, run_config, saved

TOLD_IN = 3


@pytest.mark.slow
def test_told_to_stop(tiny_world: TinyWorld, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = run_config("packed, by a worker", tiny_world)
    with config.unlocked():
        config.checkpoint.every = 1000
        config.data.num_workers = 0
    undisturbed, told = tmp_path / "undisturbed", tmp_path / "told"
    loop.train(config, undisturbed)

    compile_step, calls = loop.compile_step, []

    def compile_and_tell(*arguments: Any) -> Any:
        train_step = compile_step(*arguments)

        def step_or_tell(*state: Any) -> Any:
            if len(calls) == TOLD_IN:
                os.kill(os.getpid(), signal.SIGTERM)
            calls.append(None)
            return train_step(*state)

        return step_or_tell

    with monkeypatch.context() as patch, pytest.raises(Preempted):
        patch.setattr(loop, "compile_step", compile_and_tell)
        loop.train(config, told)
    # The step under way is finished and saved, between two regular checkpoints.
    assert [int(path.name) for path in (told / CHECKPOINTS).iterdir()] == [TOLD_IN + 1]
    loop.train(config, told)

    assert [line["step"] for line in logged(told)] == list(range(STEPS))
    assert logged(told) == logged(undisturbed)
    ours, theirs = saved(told, STEPS), saved(undisturbed, STEPS)
    for item, leaves in theirs.items():
        assert leaves.keys() == ours[item].keys()
        for name, leaf in leaves.items():
            np.testing.assert_array_equal(ours[item][name], leaf, err_msg=f"{item} {name}")


def test_a_lone_process_listens_only_while_it_trains() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with PreemptionNotice() as notice:
        assert not notice.reached(1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert notice.reached(2)
    assert signal.getsignal(signal.SIGTERM) is before


def test_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(EXIT_CODE, raising=False)
    assert Preempted().code == 0
    monkeypatch.setenv(EXIT_CODE, "75")
    assert Preempted().code == 75
