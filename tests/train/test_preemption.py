"""When a process listens for a notice, and how it exits; what it saves by then is in test_resume.py."""

import os
import signal

import pytest

from sg4v_jax.train.preemption import EXIT_CODE, Preempted, PreemptionNotice


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
