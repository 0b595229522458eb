"""The limits hold in every span of time, on a clock that the test moves."""

import asyncio
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sg4v_jax.caption.collect.limits import Limiter, TokenBucket, backoff
from tests.caption.collect.virtual_time import run


@given(
    st.floats(1, 1e6),
    st.lists(
        st.tuples(st.floats(0, 100), st.integers(1, 5000), st.integers(0, 5000)), min_size=2, max_size=40
    ),
)
def test_no_span_sees_more_than_the_rate_and_one_request(
    per_minute: float, asks: list[tuple[float, int, int]]
) -> None:
    bucket, now, granted = TokenBucket(per_minute, 0.0), 0.0, []
    for gap, amount, unused in asks:
        now += gap
        granted.append((now + bucket.take(amount, now), amount))
        bucket.give_back(min(unused, amount))
        granted[-1] = (granted[-1][0], amount - min(unused, amount))
    for first, last in itertools.combinations(range(len(granted)), 2):
        span = granted[last][0] - granted[first][0]
        used = sum(amount for _, amount in granted[first:last])
        assert used <= per_minute / 60 * span * (1 + 1e-9) + 1e-6


def test_a_bucket_is_no_slower_than_its_rate() -> None:
    bucket = TokenBucket(60, 0.0)
    assert [bucket.take(1, 0.0) for _ in range(4)] == [0.0, 1.0, 2.0, 3.0]
    assert bucket.take(1, 100.0) == 0.0, "what is owed is paid back by waiting"
    assert bucket.take(1, 100.0) == 1.0, "and waiting longer saves nothing up"
    assert TokenBucket(0, 0.0).take(10**9, 0.0) == 0.0
    with pytest.raises(ValueError, match="-1"):
        TokenBucket(-1, 0.0)


def test_a_pause_holds_for_all_and_for_those_who_wait_already() -> None:
    sent = []

    async def main() -> None:
        limiter = Limiter(60, 0, asyncio.Event())
        clock = asyncio.get_running_loop()

        async def ask() -> None:
            await limiter.acquire(1)
            sent.append(clock.time())
            if len(sent) == 3:
                limiter.pause(50.0)

        await asyncio.gather(*(ask() for _ in range(6)))

    run(main())
    assert sent[:3] == [0.0, 1.0, 2.0]
    assert all(52.0 <= time <= 53.0 for time in sent[3:])


def test_a_pause_that_is_made_longer_and_one_that_ends_early() -> None:
    sent = []

    async def main() -> None:
        stopped, clock = asyncio.Event(), asyncio.get_running_loop()
        limiter = Limiter(0, 0, stopped)

        async def ask() -> None:
            await limiter.acquire(1)
            sent.append(clock.time())

        limiter.pause(10.0)
        clock.call_at(5.0, limiter.pause, 10.0)
        await ask()
        limiter.pause(1000.0)
        clock.call_at(100.0, stopped.set)
        await ask()

    run(main())
    assert 15.0 <= sent[0] <= 16.0 and sent[1] == 100.0


def test_backoff_grows_and_is_jittered() -> None:
    for retry in range(10):
        waits = [backoff(retry, 1.0, cap=60.0) for _ in range(300)]
        longest = min(60.0, 2.0**retry)
        assert 0 <= min(waits) < 0.2 * longest and 0.8 * longest < max(waits) <= longest
