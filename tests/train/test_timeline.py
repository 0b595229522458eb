"""Wall time by cause, with a clock and a device that do what they are told."""

import threading

import pytest

from sg4v_jax.train.timeline import DATA, EVAL, INIT, PROFILE, SAVE, STEP, Timeline


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Result:
    """Of a step: ready when the test says so."""

    def __init__(self, error: Exception | None = None) -> None:
        self._done, self._error = threading.Event(), error

    def block_until_ready(self) -> None:
        self._done.wait()
        if self._error:
            raise self._error

    def finish(self, timeline: Timeline) -> None:
        """Comes back when the timeline has seen it."""
        before = len(timeline._ready)
        self._done.set()
        while len(timeline._ready) == before:
            threading.Event().wait(0.001)


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_waiting_counts_from_when_the_device_has_nothing_left(clock: Clock) -> None:
    timeline = Timeline(clock)
    first, second, third = Result(), Result(), Result()
    clock.now = 2.0
    with timeline.waiting(DATA):
        clock.now = 3.0  # The first batch: still starting up.
    clock.now = 10.0
    timeline.handed_over(first)
    with timeline.waiting(DATA):
        clock.now = 11.0  # The device has work meanwhile.
    timeline.handed_over(second)
    clock.now = 12.0
    first.finish(timeline)
    with timeline.waiting(DATA):
        clock.now = 14.0
        second.finish(timeline)
        clock.now = 17.0  # Three of the five seconds were idle.
    clock.now = 17.5
    timeline.handed_over(third)
    clock.now = 20.0
    third.finish(timeline)
    clock.now = 20.25
    timeline.settle()
    expected = dict.fromkeys((SAVE, EVAL, PROFILE), 0.0) | {INIT: 10.0, DATA: 3.0, STEP: 7.25}
    assert timeline.seconds == expected
    assert timeline.steps == 3
    assert timeline.durations == [2.0, 2.0, 6.0]
    timeline.close()


def test_no_second_is_lost_or_counted_twice_across_windows(clock: Clock) -> None:
    timeline = Timeline(clock)
    for start in range(0, 50, 10):
        clock.now = start + 1.0
        result = Result()
        timeline.handed_over(result)
        clock.now = start + 3.0
        result.finish(timeline)
        if start % 20 == 0:
            clock.now = start + 4.0
            timeline.settle()
        with timeline.waiting(SAVE):
            clock.now = start + 6.0
        with timeline.waiting(EVAL):
            clock.now = start + 9.0
    timeline.settle()
    assert sum(timeline.seconds.values()) == clock.now == 49.0
    # A save starts when the step ends, or a second later where the host first settled.
    assert timeline.seconds[SAVE] == 3 * 2 + 2 * 3
    assert timeline.seconds[EVAL] == 5 * 3
    assert (timeline.seconds[INIT], timeline.steps) == (1.0, 5)
    timeline.settle()
    assert sum(timeline.seconds.values()) == 49.0
    timeline.close()


def test_a_step_that_fails_does_not_hang(clock: Clock) -> None:
    timeline = Timeline(clock)
    result = Result(RuntimeError("out of memory"))
    timeline.handed_over(result)
    result.finish(timeline)
    timeline.settle()
    assert timeline.steps == 1
    timeline.close()
    Timeline(clock).close()  # Without any step.
