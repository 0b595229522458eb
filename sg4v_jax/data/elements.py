"""Records as samples in their order, read ahead by threads or worker processes that may die."""

import contextlib
import itertools
import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any

import grain
import jax
import numpy as np
from absl import flags

from sg4v_jax.data.reader import Element, Reader

log = logging.getLogger(__name__)

# Grain's name for its processes.
_WORKER_NAME = "grain-process-prefetch"
_MAX_RESTARTS = 2
# A worker has to import this library first.
_START_FACTOR = 10
_GRACE_SECONDS = 300


class Positions:
    """The positions of a mixture that processes share: `leftover`, then all from `start` on.

    Each process takes every n-th; indexed by how many of its own it has read.
    """

    def __init__(self, leftover: Sequence[int], start: int, shard: tuple[int, int] = (0, 1)):
        """Args:
        leftover: positions that come first.
        start: the one after them.
        shard: (index, count) of this process.
        """
        self._leftover, self._start, self._shard = list(leftover), start, shard

    def __getitem__(self, n: int) -> int:
        index, count = self._shard
        n = index + n * count
        return self._leftover[n] if n < len(self._leftover) else self._start + n - len(self._leftover)


class Elements:
    """An iterator over what `reader` makes of positions.

    A worker process that dies or is stuck is replaced, and reading goes on at the same record, so that the
    order never depends on workers.
    """

    def __init__(
        self,
        reader: Reader,
        positions: Positions,
        read: int,
        *,
        num_threads: int,
        num_workers: int,
        worker_timeout: float,
    ):
        """Args:
        reader: makes an element of a position.
        positions: in the order in which they are read.
        read: how many of them have been, before.
        num_threads, num_workers, worker_timeout: as in `loader.LoaderConfig`.
        """
        self._reader, self._positions, self._read = reader, positions, read
        self._num_threads, self._num_workers = num_threads, num_workers
        self._timeout, self._starting = worker_timeout, False
        self._stream: grain.DatasetIterator | None = None

    def __iter__(self) -> Iterator[Element]:
        return self

    def __next__(self) -> Element:
        for restarts in itertools.count():
            if self._stream is None:
                self._stream = self._open()
            try:
                with self._watched():
                    element = next(self._stream)
                break
            except RuntimeError as error:
                if "Worker process was terminated" not in str(error):
                    raise
                self._restart(error, restarts)
        self._starting = False
        self._read += 1
        # Out of the workers' shared memory, of which there may be little.
        return jax.tree.map(_own, element) if self._num_workers else element

    def close(self) -> None:
        """Ends threads and worker processes."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def _open(self) -> grain.DatasetIterator:
        self._starting = True
        source = _Source(self._reader, self._positions, self._read)
        buffer = max(2 * self._num_threads, 1)
        elements = grain.MapDataset.source(source).to_iter_dataset(
            grain.ReadOptions(num_threads=self._num_threads, prefetch_buffer_size=buffer)
        )
        if self._num_workers:
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()  # Grain reads its flags, which are not ours.
            # Small arrays are cheaper to send than to share.
            options = grain.experimental.DatasetOptions(min_shm_size=1 << 16)
            elements = grain.experimental.WithOptionsIterDataset(elements, options).mp_prefetch(
                grain.MultiprocessingOptions(self._num_workers, per_worker_buffer_size=buffer),
                worker_init_fn=_Worker(os.getpid()),
            )
        return iter(elements)

    def _restart(self, error: RuntimeError, restarts: int) -> None:
        """Ends the workers; new ones go on at the same element, so the order stays what it was."""
        self.close()
        what = f"a data worker process died ({error.args[0].split('. ')[0]})"
        if restarts >= _MAX_RESTARTS:
            raise RuntimeError(
                f"{what}, {restarts + 1} times at the same record. Was it out of memory, or is a file system "
                "stuck? Try fewer data.num_workers or data.num_threads; the run resumes from its last "
                "checkpoint"
            ) from error
        log.warning("%s; it is started again at the same record", what)

    @contextlib.contextmanager
    def _watched(self) -> Iterator[None]:
        """Kills the workers if they bring nothing for too long; Grain then says that one died."""
        if not self._num_workers:
            yield
            return
        seconds = self._timeout * (_START_FACTOR if self._starting else 1)
        timer = threading.Timer(seconds, _kill_workers, (seconds,))
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()


def _kill_workers(seconds: float) -> None:
    workers = [child for child in multiprocessing.active_children() if child.name.startswith(_WORKER_NAME)]
    log.error(
        "no record came from %d data workers for %.0f s (config.data.worker_timeout): they are killed",
        len(workers),
        seconds,
    )
    for worker in workers:
        worker.kill()


class _Source:
    """Elements from the `offset`-th on: a random-access source as Grain wants it."""

    def __init__(self, reader: Reader, positions: Positions, offset: int):
        self._reader, self._positions, self._offset = reader, positions, offset

    def __len__(self) -> int:
        return 1 << 40

    def __getitem__(self, i: int) -> Element:
        return self._reader(self._positions[self._offset + i])


class _Worker:
    """What a worker process does first: it must not outlive a loader that was killed."""

    def __init__(self, parent: int):
        self._parent = parent

    def __call__(self, index: int, count: int) -> None:
        # Ctrl-C and a notice of preemption may come to all processes of a job, and are the loader's to
        # handle: it needs records until all hosts have stopped. No worker ever touches an accelerator.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, self._leave_later)
        jax.config.update("jax_platforms", "cpu")
        threading.Thread(target=self._watch, daemon=True).start()

    def _leave_later(self, number: int, frame: FrameType | None) -> None:
        timer = threading.Timer(_GRACE_SECONDS, os._exit, (1,))
        timer.daemon = True
        timer.start()

    def _watch(self) -> None:
        while os.getppid() == self._parent:
            time.sleep(0.5)
        os._exit(1)


def _own(leaf: Any) -> Any:
    return np.array(leaf) if isinstance(leaf, np.ndarray) else leaf
