"""Append-only JSON lines that survive a kill, and a lock on the directory that holds them."""

import contextlib
import errno
import fcntl
import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any


class Journal:
    """A file of JSON objects, one on each line; what `append` returned from is on disk.

    With `sync_every` above 1 it is with the system: a killed process loses none of it, a power cut
    fewer than so many lines.
    """

    def __init__(self, path: str | os.PathLike[str], *, sync_every: int = 1):
        self.path, self._sync_every, self._waiting = pathlib.Path(path), sync_every, 0
        created = not self.path.exists()
        self._file = self.path.open("ab", buffering=0)
        if created:
            _sync_directory(self.path.parent)

    def entries(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """(byte offset, object) of every line. A last line that a kill cut off is cut away.

        Raises:
          ValueError: a line in between is no JSON object.
        """
        with self.path.open("rb") as file:
            offset = 0
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    os.truncate(self.path, offset)
                    return
                try:
                    entry = json.loads(line)
                    if not isinstance(entry, dict):
                        raise ValueError("no object")
                except ValueError as error:
                    raise ValueError(f"{self.path}: line {number} is damaged ({error}); remove it") from error
                yield offset, entry
                offset += len(line)

    def append(self, *entries: dict[str, Any]) -> int:
        """Writes lines, on disk as `sync_every` says; gives the byte offset of the first.

        Raises:
          OSError: they could not be written; none of them is in the file.
        """
        data = b"".join(json.dumps(entry, ensure_ascii=False).encode() + b"\n" for entry in entries)
        waiting = self._waiting + len(entries)
        offset = self._file.seek(0, os.SEEK_END)
        try:
            if self._file.write(data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), os.fspath(self.path))
            if waiting >= self._sync_every:
                os.fsync(self._file.fileno())
                waiting = 0
        except OSError:
            # Whatever is appended later would become part of a broken line.
            self._file.truncate(offset)
            raise
        self._waiting = waiting
        return offset

    def at(self, offset: int) -> dict[str, Any]:
        """The object whose line begins at a byte offset."""
        with self.path.open("rb") as file:
            file.seek(offset)
            entry: dict[str, Any] = json.loads(file.readline())
            return entry

    def close(self) -> None:
        """Closes the file, when all of it is on disk."""
        try:
            if self._waiting:
                os.fsync(self._file.fileno())
        finally:
            self._file.close()


def _sync_directory(directory: pathlib.Path) -> None:
    """A file's name is lost with the power, too, until its directory is on disk."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def locked(directory: str | os.PathLike[str]) -> Iterator[None]:
    """Holds a directory for one process: two would pay for the same requests.

    Raises:
      ValueError: another process holds it.
    """
    with (pathlib.Path(directory) / ".lock").open("w") as file:
        try:
            # The system lets go of it when the process ends, however it ends.
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ValueError(f"{directory}: another process is collecting there") from error
        yield
