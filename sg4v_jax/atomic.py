"""Files that appear whole or not at all."""

import contextlib
import errno
import os
import pathlib
from collections.abc import Iterator
from typing import BinaryIO

# Of the disk, of its user's part, of what one file may take.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A file to write that takes the place of `path` when the block ends well.

    Until then, and if the block raises, `path` is what it was. Processes that write the same path don't
    disturb each other: the last one's file stands. A killed process leaves a hidden `.NAME.PID.partial`.

    Args:
      path: of a file in a directory that exists.

    Raises:
      OSError: it can't be written; the message says where, which the system's doesn't for a full disk.
    """
    path = pathlib.Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in FULL:
            raise OSError(error.errno, error.strerror, os.fspath(path)) from error
        raise


def write(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Writes a file as a whole, text as UTF-8; raises as `replacing` does."""
    with replacing(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)
