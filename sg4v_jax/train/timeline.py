"""Where a run's wall time goes, seen without making the device wait."""

import contextlib
import dataclasses
import itertools
import queue
import threading
import time
from collections.abc import Callable, Iterator

import jax

INIT, DATA, STEP, SAVE, EVAL, PROFILE = "init", "data", "step", "save", "eval", "profile"


@dataclasses.dataclass
class _Wait:
    """The host did something else from `start` to `end`, with so many steps handed to the device."""

    what: str
    start: float
    end: float
    steps: int


class Timeline:
    """Splits wall time into what the device did and what it waited for.

    The host hands steps to the device and goes on; so what it does meanwhile costs time only from where
    the device runs out of steps. When that is, a thread finds out: it waits for each step's result.

    Attributes:
      seconds: by cause, from the start to the last `settle`, without gaps. `init` ends when the first
        step is handed over, with its compilation. `step` is all that is nothing else.
      steps: how many the device had done by then.
      durations: of each step, from one result to the next. Whoever reads them clears them.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self._clock = clock
        self.seconds = dict.fromkeys((INIT, DATA, STEP, SAVE, EVAL, PROFILE), 0.0)
        self.steps, self.durations = 0, list[float]()
        self._settled = clock()  # `seconds` reach until here.
        self._waits: list[_Wait] = []
        self._handed = 0
        self._results: queue.Queue[jax.Array | None] = queue.Queue()
        self._ready: list[float] = []  # Of the steps since the last `settle`.
        self._thread: threading.Thread | None = None

    @contextlib.contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """Around what the host does between steps; `what` is the cause it counts as."""
        start = self._clock()
        try:
            yield
        finally:
            if self._handed:  # Before, all is `init`.
                self._waits.append(_Wait(what, start, self._clock(), self._handed))

    def handed_over(self, result: jax.Array) -> None:
        """A step is in the device's queue; `result` is something that it computes."""
        if not self._handed:
            now = self._clock()
            self.seconds[INIT] += now - self._settled
            self._settled = now
            self._thread = threading.Thread(target=self._watch, daemon=True, name="timeline")
            self._thread.start()
        self._handed += 1
        self._results.put(result)

    def settle(self) -> None:
        """Brings the attributes up to now, once the device has done all it was given."""
        self._results.join()
        now, before = self._clock(), self._settled
        # When the device had done the n-th step; before the first of these it was done all along.
        done = [before, *self._ready]
        idle = 0.0
        for wait in self._waits:
            start = max(wait.start, before, done[wait.steps - self.steps])
            lost = max(0.0, wait.end - start)
            self.seconds[wait.what] += lost
            idle += lost
        self.seconds[STEP] += now - before - idle
        self.durations += [after - before for before, after in itertools.pairwise(done)]
        self.steps += len(self._ready)
        self._settled = now
        self._waits.clear()
        self._ready.clear()

    def close(self) -> None:
        """Ends the thread."""
        self._results.put(None)
        if self._thread:
            self._thread.join()

    def _watch(self) -> None:
        while (result := self._results.get()) is not None:
            # What went wrong in a step is raised where its result is read.
            with contextlib.suppress(Exception):
                result.block_until_ready()
            self._ready.append(self._clock())
            del result
            self._results.task_done()
