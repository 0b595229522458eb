"""Asks an endpoint about every item: workers on one event loop, so the ledger needs no locks."""

import asyncio
import contextlib
import dataclasses
import json
import logging
import signal
from collections.abc import Callable, Iterator
from typing import Protocol

from sg4v_jax.caption.collect.collection import Collection
from sg4v_jax.caption.collect.endpoint import EndpointError
from sg4v_jax.caption.collect.limits import Limiter, backoff, sleep
from sg4v_jax.caption.collect.request import Completion, Item, body
from sg4v_jax.caption.collect.scan import read_image
from sg4v_jax.data.image import ImageError

logger = logging.getLogger(__name__)

# An endpoint that asks for more patience than this has no work for us today.
_LONGEST_PAUSE = 3600.0


class Answering(Protocol):
    """What is needed of an endpoint."""

    async def complete(self, body: bytes) -> Completion: ...


@dataclasses.dataclass(frozen=True)
class Pace:
    """How fast to ask, and when to give up.

    Attributes:
      workers: requests under way at a time.
      rpm: requests per minute; 0 is no limit.
      tpm: tokens per minute, prompt and answer; 0 is no limit.
      retries: repeats of a request that failed for the moment.
      backoff: seconds; the first wait before a repeat is up to this.
      stop_after: errors in a row, for each worker, that end the run.
    """

    workers: int = 8
    rpm: float = 0
    tpm: float = 0
    retries: int = 6
    backoff: float = 1.0
    stop_after: int = 10

    def __post_init__(self) -> None:
        if min(self.workers, self.stop_after) < 1 or min(self.rpm, self.tpm, self.retries, self.backoff) < 0:
            raise ValueError(f"out of range: {self}")


@dataclasses.dataclass
class Stop:
    """Why a run ended before everything was asked.

    Attributes:
      reason: one line; "" if nothing stopped it.
      is_error: a person has to do something about it.
    """

    reason: str = ""
    is_error: bool = False


class Collector:
    """One run over a collection. Use once, within an event loop."""

    def __init__(
        self,
        collection: Collection,
        endpoint: Answering,
        pace: Pace,
        progress: Callable[[Collection], None] = lambda _: None,
    ):
        """`progress` is called after every item that is over."""
        self._collection, self._endpoint, self._pace = collection, endpoint, pace
        self._ledger, self._progress = collection.ledger, progress
        self._request = collection.settings.request
        self._stopped, self._settled = asyncio.Event(), asyncio.Event()
        self._limiter = Limiter(pace.rpm, pace.tpm, self._stopped)
        self._stop = Stop()
        self._in_flight = 0
        self._errors_in_a_row = 0

    async def run(self) -> Stop:
        """Asks about everything that is open. Requests under way are always waited for and recorded."""
        todo = iter(self._collection.todo())
        with self._signals():
            workers = (self._work(todo) for _ in range(self._pace.workers))
            ended = await asyncio.gather(*workers, return_exceptions=True)
        for error in filter(None, ended):
            raise error
        return self._stop

    def stop(self, reason: str, is_error: bool = False) -> None:
        """Lets no further request out."""
        if not self._stopped.is_set():
            self._stop = Stop(reason, is_error)
            self._stopped.set()
            self._settled.set()

    async def _work(self, todo: Iterator[Item]) -> None:
        try:
            for item in todo:
                await self._settle(item)
                if self._stopped.is_set():
                    return
                self._progress(self._collection)
        except BaseException as error:
            # A full disk, say: the others put away what they have, and then it is raised.
            self.stop(repr(error), is_error=True)
            raise

    async def _settle(self, item: Item) -> None:
        """Asks until there is a caption, or there is nothing more to be done today."""
        while self._collection.is_open(item) and not self._stopped.is_set():
            completion = await self._answer(item)
            if completion is None:
                return
            self._collection.record(item, completion)

    async def _answer(self, item: Item) -> Completion | None:
        """An answer that is not on disk yet; None if there is none today."""
        for retry in range(self._pace.retries + 1):
            try:
                completion = await self._ask(item)
                if completion is not None:
                    self._errors_in_a_row = 0
                return completion
            except EndpointError as error:
                self._ledger.error(item, error)
                self._judge(error)
                if error.kind != "transient" or self._stopped.is_set():
                    return None
                if retry < self._pace.retries:
                    await sleep(backoff(retry, self._pace.backoff), self._stopped)
        return None

    async def _ask(self, item: Item) -> Completion | None:
        """One request; None if the run stopped before it was sent."""
        attempt = self._ledger.state(item.id).answers
        loop = asyncio.get_running_loop()
        try:
            data = await loop.run_in_executor(None, self._body, item, attempt)
        except ImageError as error:
            raise EndpointError("transient", str(error)) from error
        prompt = round(self._ledger.estimate(item, self._request)[0])
        tokens = prompt + self._request.max_tokens
        await self._limiter.acquire(tokens)
        cost = self._ledger.max_cost(item, self._request)
        while not self._ledger.affords(cost) and self._in_flight and not self._stopped.is_set():
            # What is under way may turn out cheaper than it could have been.
            self._settled.clear()
            await self._settled.wait()
        if not self._ledger.affords(cost):
            self.stop(f"the budget of ${self._ledger.budget:.2f} has no room for another request")
        if self._stopped.is_set():
            return None
        self._ledger.ask(item, cost)
        self._in_flight += 1
        used = prompt
        try:
            completion = await self._endpoint.complete(data)
            used = (completion.prompt_tokens or prompt) + (completion.completion_tokens or 0)
            return completion
        finally:
            self._limiter.settle(tokens, used)
            self._in_flight -= 1
            loop.call_soon(self._settled.set)  # After the answer's cost is in the ledger.

    def _body(self, item: Item, attempt: int) -> bytes:
        image = read_image(self._collection.root, item.path, item.image_sha256)
        return json.dumps(body(item, image, self._request, attempt)).encode()

    def _judge(self, error: EndpointError) -> None:
        """Pauses or stops everybody, if an error is about more than one request."""
        if error.kind == "stop":
            self.stop(str(error), is_error=True)
        if error.retry_after is not None:
            if error.retry_after > _LONGEST_PAUSE:
                self.stop(f"the endpoint asks to wait {error.retry_after:.0f} s: {error}", is_error=True)
            logger.debug("pausing for %.1f s: %s", error.retry_after, error)
            self._limiter.pause(error.retry_after)
            return  # It is alive, and tells when to come back.
        self._errors_in_a_row += 1
        if self._errors_in_a_row >= self._pace.stop_after * self._pace.workers:
            self.stop(f"{self._errors_in_a_row} errors in a row, the last: {error}", is_error=True)

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """The first Ctrl-C or SIGTERM ends the run in order; a second one ends the process."""
        loop = asyncio.get_running_loop()

        def interrupted(number: signal.Signals) -> None:
            self.stop(f"stopped by {number.name}")
            loop.remove_signal_handler(number)

        numbers = (signal.SIGINT, signal.SIGTERM)
        # Only a program's main thread may have handlers.
        with contextlib.suppress(ValueError, RuntimeError, NotImplementedError):
            for number in numbers:
                loop.add_signal_handler(number, interrupted, number)
        try:
            yield
        finally:
            for number in numbers:
                loop.remove_signal_handler(number)
