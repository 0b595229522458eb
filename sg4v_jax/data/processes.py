"""Work shared among processes, with results in the order of the work."""

import concurrent.futures
import concurrent.futures.process
import itertools
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def run_in_order(function: Callable[[Item], Result], items: Sequence[Item], workers: int) -> Iterator[Result]:
    """Calls `function` on every item and yields the results in order.

    Args:
      function: must be picklable, as items and results, if there are several workers.
      items: what to work on.
      workers: processes; with 1 (or one item) everything runs in this one.

    Raises:
      Whatever `function` raises, for the first item that makes it; what has not begun is given up.
      ChildProcessError: a process was killed.
    """
    workers = min(workers, len(items))
    if workers <= 1:
        yield from map(function, items)
        return
    # A fork would copy the locks of the threads that JAX and Grain run.
    context = multiprocessing.get_context("spawn")
    executor = concurrent.futures.ProcessPoolExecutor(workers, context, initializer=_end_with_parent)
    try:
        yield from executor.map(function, items)
    except concurrent.futures.process.BrokenProcessPool as error:
        raise ChildProcessError(
            "a worker process ended without a word: was it killed for its memory? Use fewer workers. Or "
            'does the script that started them lack `if __name__ == "__main__":`?'
        ) from error
    finally:
        executor.shutdown(cancel_futures=True)


def _end_with_parent() -> None:
    """Ends this process when its parent is killed; it would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class Steps(Generic[Result]):
    """Consumes results as it is iterated over, with a step for every record a result is about.

    A progress bar that wraps it counts records, and knows how many there will be.
    """

    def __init__(self, results: Iterator[Result], counts: Sequence[int], consume: Callable[[Result], None]):
        self._results, self._counts, self._consume = results, counts, consume

    def __len__(self) -> int:
        return sum(self._counts)

    def __iter__(self) -> Iterator[None]:
        for result, count in zip(self._results, self._counts, strict=True):
            self._consume(result)
            yield from itertools.repeat(None, count)
