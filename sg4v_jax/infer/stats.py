"""What an engine has done."""

import contextlib
import dataclasses
import time
from collections.abc import Iterator


@dataclasses.dataclass
class Stats:
    """Counts and times, added up over all calls.

    Attributes:
      groups: the engine's slots, or groups of them in beam search.
      requests: requests that were given a slot.
      tokens: tokens of answers.
      steps: decoding steps.
      prefills: prefilling programs that ran.
      host_seconds: Python between waits: choosing, dispatching, bookkeeping.
      wait_seconds: waiting for the device.
    """

    groups: int
    requests: int = 0
    tokens: int = 0
    steps: int = 0
    prefills: int = 0
    host_seconds: float = 0.0
    wait_seconds: float = 0.0

    @property
    def occupancy(self) -> float:
        """Share of the slots' steps that gave a token of an answer."""
        return self.tokens / max(self.steps * self.groups, 1)

    @contextlib.contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Adds the time inside to the attribute `name`."""
        start = time.perf_counter()
        yield
        setattr(self, name, getattr(self, name) + time.perf_counter() - start)
