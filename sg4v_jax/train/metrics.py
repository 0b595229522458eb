"""Where a run's numbers go: one JSON object per line, which is also what reports read."""

import json
import logging
import os
import pathlib
from collections.abc import Mapping
from typing import Any

log = logging.getLogger(__name__)

FILE_NAME = "metrics.jsonl"
# How names begin of what is measured: no two runs have the same. All else a restarted run repeats.
MEASURED = ("speed/", "memory/", "goodput/")


class MetricsFile:
    """Append-only `metrics.jsonl`.

    A resumed run first drops the lines of steps it is about to repeat, so that a step stands in the
    file once whatever happened to the process.
    """

    def __init__(self, path: pathlib.Path, first_step: int):
        if path.exists():
            kept = [line for line in read(path) if line["step"] < first_step]
            temporary = path.with_suffix(".tmp")
            temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
            os.replace(temporary, path)
        self._path, self._file, self._unwritten = path, path.open("ab", buffering=0), b""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Appends the numbers of one step; what a full disk does not take, the next call writes."""
        failed_before = bool(self._unwritten)
        self._unwritten += (json.dumps({"step": step, **values}) + "\n").encode()
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[self._file.write(self._unwritten) or 0 :]
        except OSError as error:
            if not failed_before:
                log.error(
                    "%s can't be written (%s): make room there; lines are kept until it works again",
                    *(self._path, error.strerror),
                )

    def close(self) -> None:
        """Ends the file."""
        self._file.close()


def read(path: pathlib.Path) -> list[dict[str, Any]]:
    """The lines of a metrics file; a last line cut off by a kill is left out."""
    lines = []
    for text in path.read_text().splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines
