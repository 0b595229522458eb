"""Where a run's numbers go: one JSON object per line, which is also what reports read."""

import contextlib
import json
import logging
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax

log = logging.getLogger(__name__)

FILE_NAME = "metrics.jsonl"
# How names begin of what is measured: no two runs have the same. All else a restarted run repeats.
MEASURED = ("speed/", "memory/", "goodput/")


class Outages:
    """Files that are only watched: one that can't be written, as on a full disk, is told of once."""

    def __init__(self) -> None:
        self._failed: set[pathlib.Path] = set()

    @contextlib.contextmanager
    def survived(self, file: pathlib.Path, then: str) -> Iterator[None]:
        """Around the writing of a file; `then` is what becomes of its content. Works again: told anew."""
        try:
            yield
        except (OSError, jax.errors.JaxRuntimeError) as error:  # The second from JAX's profiler.
            if file not in self._failed:
                reason = getattr(error, "strerror", None) or error
                log.error("%s can't be written (%s): make room there; %s", file, reason, then)
            self._failed.add(file)
        else:
            self._failed.discard(file)


class MetricsFile:
    """Append-only `metrics.jsonl`.

    A resumed run first drops the lines of steps it is about to repeat, so that a step stands in the
    file once whatever happened to the process.
    """

    def __init__(self, path: pathlib.Path, first_step: int):
        if path.exists():
            # Steps only grow, so the lines that go are the last: that takes no room on a full disk.
            os.truncate(path, _bytes_before(path, first_step))
        self._path, self._file, self._unwritten = path, path.open("ab", buffering=0), b""
        self._outages = Outages()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Appends the numbers of one step; what a full disk does not take, the next call writes."""
        self._unwritten += (json.dumps({"step": step, **values}) + "\n").encode()
        self._flush()

    def close(self) -> None:
        """Ends the file; lines that nobody took are lost."""
        if self._unwritten:
            self._flush()
        self._file.close()

    def _flush(self) -> None:
        with self._outages.survived(self._path, "lines are kept until it works again"):
            while self._unwritten:
                self._unwritten = self._unwritten[self._file.write(self._unwritten) or 0 :]


def _bytes_before(path: pathlib.Path, step: int) -> int:
    """Length of the whole lines of steps before one."""
    length = 0
    with path.open("rb") as file:
        for line in file:
            try:
                if not line.endswith(b"\n") or json.loads(line)["step"] >= step:
                    break
            except ValueError:
                break
            length += len(line)
    return length


def read(path: pathlib.Path) -> list[dict[str, Any]]:
    """The lines of a metrics file; a last line cut off by a kill is left out."""
    lines = []
    for text in path.read_text().splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines
