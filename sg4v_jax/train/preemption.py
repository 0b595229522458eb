"""Stopping in time: a notice (SIGTERM) to any process ends the run on all of them, at one agreed step."""

import os
import signal
import threading
from types import FrameType

import jax
from jax.experimental import multihost_utils

EXIT_CODE = "SG4V_PREEMPTED_EXIT_CODE"


class Preempted(SystemExit):
    """The run was told to stop; it has saved its state and is not finished.

    Uncaught, it ends the process with 0. Where exit codes are all that is seen of a run (a Kubernetes
    job, a babysitter), the environment variable SG4V_PREEMPTED_EXIT_CODE names another one, for 0
    would read as "finished".
    """

    def __init__(self) -> None:
        super().__init__(int(os.environ.get(EXIT_CODE, "0")))


class PreemptionNotice:
    """Listens for SIGTERM while it is entered.

    After `jax.distributed.initialize` JAX catches the signal, in whichever process it arrives, and
    agrees with the others on a step that none of them has passed. A lone process listens for itself.
    """

    def __init__(self) -> None:
        self._received = False

    def __enter__(self) -> "PreemptionNotice":
        # A handler of ours would replace JAX's. Python sets handlers only in its main thread.
        alone = not jax.distributed.is_initialized()
        self._listens = alone and threading.current_thread() is threading.main_thread()
        if self._listens:
            self._previous = signal.signal(signal.SIGTERM, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        if self._listens:
            signal.signal(signal.SIGTERM, self._previous)

    def reached(self, step: int) -> bool:
        """Whether to save and stop after `step` steps; true on all processes for the same step.

        To be asked on every process after every step, as the agreement needs to know where each is.
        """
        return self._received or multihost_utils.reached_preemption_sync_point(step)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received = True
