"""A disk that is full, for a while."""

import contextlib
import resource
from collections.abc import Iterator


@contextlib.contextmanager
def small_files(limit: int) -> Iterator[None]:
    """Writes beyond `limit` bytes of a file fail, as on a full disk. Not a fixture: pytest writes, too."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
