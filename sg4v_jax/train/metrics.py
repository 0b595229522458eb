"""Where a run's numbers go: one JSON object per line, which is also what reports read."""

import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

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
        self._file = path.open("a")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Appends the numbers of one step."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()

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
