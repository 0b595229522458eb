"""A trace of some steps for XProf or Perfetto, in `WORKDIR/profile`."""

import contextlib
import logging
import pathlib
from collections.abc import Iterator

import jax

from sg4v_jax.train.metrics import Outages
from sg4v_jax.train.timeline import PROFILE, Timeline

log = logging.getLogger(__name__)

DIRECTORY = "profile"


class ProfilerWindow:
    """Traces `num_steps` steps from `first_step` on; none if that is 0."""

    def __init__(self, workdir: pathlib.Path, first_step: int, num_steps: int, timeline: Timeline):
        self._directory, self._timeline = workdir / DIRECTORY, timeline
        self._first, self._end = first_step, first_step + num_steps
        self._running, self._outages = False, Outages()

    @contextlib.contextmanager
    def around(self, step: int) -> Iterator[None]:
        """Around what the loop does for a step."""
        if not self._first <= step < self._end:
            yield
            return
        if step == self._first:
            # Without the steps before, which the device may still be doing.
            self._timeline.settle()
            with self._timeline.waiting(PROFILE):
                jax.profiler.start_trace(self._directory)
            self._running = True
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            yield
        if step + 1 == self._end:
            self.stop()

    def stop(self, *, wait: bool = True) -> None:
        """Writes the trace, if there is one; once the device has done its steps, or as it is."""
        if self._running:
            self._running = False
            if wait:
                self._timeline.settle()
            with self._outages.survived(self._directory, "there is no trace"):
                with self._timeline.waiting(PROFILE):
                    jax.profiler.stop_trace()
                log.info(
                    "wrote the trace of steps %d to %d to %s", *(self._first, self._end - 1, self._directory)
                )
