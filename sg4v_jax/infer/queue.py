"""Requests on their way to the device: pulled lazily, prepared by threads, grouped by shape."""

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Generic

from sg4v_jax.infer.prepare import AnyRequest, Prepared


class Queue(Generic[AnyRequest]):
    """Requests ahead of need.

    Attributes:
      ahead: how many are pulled before the first of them is taken.
    """

    def __init__(
        self,
        requests: Iterable[AnyRequest | None],
        prepare: Callable[[AnyRequest], Prepared[AnyRequest]],
        ahead: int,
    ):
        self.ahead = ahead
        self._source: Iterator[AnyRequest | None] = iter(requests)
        self._exhausted = False
        self._prepare: Callable[[AnyRequest], Prepared[AnyRequest]] = prepare
        # Decoding and resizing images releases the interpreter's lock for most of the time.
        self._threads = ThreadPoolExecutor(min(8, os.cpu_count() or 1), thread_name_prefix="prepare")
        self._pending: list[Future[Prepared[AnyRequest]]] = []
        self._ready: list[Prepared[AnyRequest]] = []

    def pull(self) -> list[Prepared[AnyRequest]]:
        """Pulls requests and looks at what the threads have done. Returns those with errors."""
        while not self._exhausted and len(self._pending) + len(self._ready) < self.ahead:
            try:
                request = next(self._source)
            except StopIteration:
                self._exhausted = True
            else:
                if request is None:  # Nothing for now: what is in the slots goes on.
                    break
                self._pending.append(self._threads.submit(self._prepare, request))
        done = [future.result() for future in self._pending if future.done()]
        self._pending = [future for future in self._pending if not future.done()]
        self._ready += [prepared for prepared in done if not prepared.error]
        return [prepared for prepared in done if prepared.error]

    def take(self, rows: int) -> list[Prepared[AnyRequest]]:
        """Up to `rows` requests of one shape: the oldest one's, or one that has all rows already.

        Fewer than `rows` only come while nothing is being prepared, for then no more can follow.
        """
        if not self._ready:
            return []
        counts: dict[Any, int] = {}
        for prepared in self._ready:
            counts[prepared.bucket] = counts.get(prepared.bucket, 0) + 1
        full = [bucket for bucket, count in counts.items() if count >= rows]
        if not full and self._pending:
            return []
        bucket = full[0] if full else self._ready[0].bucket
        taken = [prepared for prepared in self._ready if prepared.bucket == bucket][:rows]
        self._ready = [prepared for prepared in self._ready if all(prepared is not t for t in taken)]
        return taken

    @property
    def empty(self) -> bool:
        """Whether nothing is left or to come."""
        return self._exhausted and not self._pending and not self._ready

    def wait(self) -> None:
        """Until the first of those being prepared is done."""
        if self._pending:
            self._pending[0].result()

    def close(self) -> None:
        """Lets the threads go."""
        self._threads.shutdown(wait=False, cancel_futures=True)
