"""How much of a run's time went into steps that counted, over all its restarts: `goodput.json`."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from sg4v_jax import atomic
from sg4v_jax.train.metrics import Outages
from sg4v_jax.train.timeline import DATA, EVAL, INIT, PROFILE, SAVE, STEP

FILE_NAME = "goodput.json"
LOST = "lost"
# What is done again when a run goes on from an earlier checkpoint. Starting up is not: it is `init` anyway.
_REPEATED = (DATA, STEP, SAVE, EVAL, PROFILE)


class Goodput:
    """Seconds by cause in `WORKDIR/goodput.json`, which a restarted run adds to.

    `lost` are the seconds of steps that a restart repeats: from the checkpoint it goes on from to the last
    time the run before it wrote the file. What came after that, and the time nothing ran, is not known.

    Attributes:
      seconds: by cause, over all starts.
    """

    def __init__(self, file: pathlib.Path, first_step: int):
        """Args:
        file: where it is; need not exist.
        first_step: steps done at the checkpoint this start goes on from.
        """
        self._file, self._outages = file, Outages()
        state = _read(file)
        self._starts = state["starts"] + 1
        # By steps done, the seconds until a checkpoint; those after the one we start from are undone.
        self._saved = {int(step): mark for step, mark in state["saved"].items() if int(step) <= first_step}
        self._before = dict(state["seconds"])
        mark = self._saved[max(self._saved)] if self._saved else {}
        for cause in _REPEATED:
            again = self._before[cause] - mark.get(cause, 0.0)
            self._before[cause] -= again
            self._before[LOST] += again
        self.seconds = dict(self._before)

    @property
    def share(self) -> float:
        """Of all time, that of steps which counted."""
        return self.seconds[STEP] / (sum(self.seconds.values()) or 1.0)

    def write(self, step: int, seconds: Mapping[str, float], *, saved: bool = False) -> None:
        """Writes the file anew, whole or not at all; where it can't be, the next call does.

        Args:
          step: steps done.
          seconds: by cause, since this start.
          saved: whether there is a checkpoint of `step`.
        """
        self.seconds = {cause: value + seconds.get(cause, 0.0) for cause, value in self._before.items()}
        if saved:
            self._saved[step] = {cause: self.seconds[cause] for cause in _REPEATED}
        state = {
            "goodput": self.share,
            "seconds": self.seconds,
            "starts": self._starts,
            "step": step,
            "saved": {str(step): mark for step, mark in self._saved.items()},
        }
        with self._outages.survived(self._file, "it stays as it is until it works again"):
            atomic.write(self._file, json.dumps(state, indent=1) + "\n")


def _read(file: pathlib.Path) -> dict[str, Any]:
    if not file.exists():
        causes = (INIT, *_REPEATED, LOST)
        return {"seconds": dict.fromkeys(causes, 0.0), "starts": 0, "saved": {}}
    try:
        state: dict[str, Any] = json.loads(file.read_text())
        return {name: state[name] for name in ("seconds", "starts", "saved")}
    except (ValueError, KeyError) as error:
        raise ValueError(f"{file}: not what a run wrote ({error!r}); remove it to count anew") from error
