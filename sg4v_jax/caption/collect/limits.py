"""How fast to ask: requests and tokens per minute, pauses that the endpoint asks for, backoff."""

import asyncio
import contextlib
import random


class TokenBucket:
    """Lets through `per_minute` units a minute, without bursts.

    A request takes at once what it needs, also more than there is, and then waits for what it owes. So
    any span of T seconds sees at most `per_minute * T / 60` units and one request more.
    """

    def __init__(self, per_minute: float, now: float):
        """`per_minute` 0 is no limit; `now` is in seconds, of any clock that `take` uses too."""
        if per_minute < 0:
            raise ValueError(f"{per_minute} per minute is no limit; 0 is none at all")
        self._rate = per_minute / 60
        self._level = 0.0
        self._updated = now

    def take(self, amount: float, now: float) -> float:
        """Takes `amount` and returns the seconds to wait before it may be used."""
        if not self._rate:
            return 0.0
        self._level = min(0.0, self._level + (now - self._updated) * self._rate)
        self._updated = now
        wait = -self._level / self._rate
        self._level -= amount
        return wait

    def give_back(self, amount: float) -> None:
        """Returns what was taken and not used."""
        self._level += amount


class Limiter:
    """Both limits and the pauses, for all workers of one event loop, on that loop's clock."""

    def __init__(self, requests_per_minute: float, tokens_per_minute: float, stopped: asyncio.Event):
        """0 is no limit. When `stopped` is set, nobody waits any longer."""
        self._now = asyncio.get_running_loop().time
        self._requests = TokenBucket(requests_per_minute, self._now())
        self._tokens = TokenBucket(tokens_per_minute, self._now())
        self._paused_until = self._now()
        self._stopped = stopped

    async def acquire(self, tokens: int) -> None:
        """Waits until a request of so many tokens may be sent, or all are stopped."""
        now = self._now()
        wait = max(self._requests.take(1, now), self._tokens.take(tokens, now))
        await sleep(wait, self._stopped)
        # Somebody may have been told to wait meanwhile; that holds for all.
        while (pause := self._paused_until - self._now()) > 0 and not self._stopped.is_set():
            await sleep(pause + random.uniform(0.0, min(1.0, pause / 10)), self._stopped)

    def settle(self, taken: int, used: int) -> None:
        """Corrects what `acquire` took by what the answer really used."""
        self._tokens.give_back(taken - used)

    def pause(self, seconds: float) -> None:
        """Nobody asks for so long."""
        self._paused_until = max(self._paused_until, self._now() + seconds)


async def sleep(seconds: float, stopped: asyncio.Event) -> None:
    """Sleeps until `stopped` is set, at most so long."""
    if seconds > 0:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stopped.wait(), seconds)


def backoff(retry: int, base: float, cap: float = 60.0) -> float:
    """Seconds before retry number `retry` (from 0): exponential, with full jitter."""
    return random.uniform(0, min(cap, base * 2**retry))
