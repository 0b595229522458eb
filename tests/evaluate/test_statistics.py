"""Intervals and tests against closed forms, scipy and a bootstrap written another way."""

import math

import numpy as np
import pytest
import scipy.stats

from sg4v_jax.evaluate.benchmark import Metric, Term
from sg4v_jax.evaluate.statistics import difference, estimate, sign_test, value


def metric(scores: dict[str, float]) -> Metric:
    return Metric("accuracy", (Term(100.0, scores, dict.fromkeys(scores, 1.0)),))


def test_an_interval_of_a_mean_is_that_of_the_normal_distribution() -> None:
    random = np.random.default_rng(0)
    scores = {str(i): float(random.random() < 0.3) for i in range(2000)}
    found = estimate(metric(scores))
    mean = float(np.mean(list(scores.values())))
    spread = 196 * math.sqrt(mean * (1 - mean) / len(scores))
    assert found.value == pytest.approx(100 * mean)
    assert found.low == pytest.approx(100 * mean - spread, abs=0.25)
    assert found.high == pytest.approx(100 * mean + spread, abs=0.25)
    assert estimate(metric(scores)) == found


def test_ratios_of_sums_are_drawn_by_unit() -> None:
    """Against scipy's bootstrap of the same statistic."""
    random = np.random.default_rng(1)
    top, bottom = random.random(80), random.random(80) + 0.5
    units = [str(i) for i in range(80)]
    terms = (
        Term(100.0, dict(zip(units, top, strict=True)), dict(zip(units, bottom, strict=True))),
        Term(50.0, dict(zip(units, bottom, strict=True)), dict.fromkeys(units, 1.0)),
    )
    found = estimate(Metric("m", terms, 200.0))

    def statistic(rows: np.ndarray, axis: int) -> np.ndarray:
        picked = rows.astype(int)
        ratio = top[picked].sum(axis) / bottom[picked].sum(axis)
        return 100 * ratio + 50 * bottom[picked].mean(axis)

    theirs = scipy.stats.bootstrap(
        (np.arange(80),), statistic, n_resamples=4000, method="percentile", rng=np.random.default_rng(2)
    ).confidence_interval
    assert found.value == pytest.approx(float(statistic(np.arange(80), 0)))
    assert found.low == pytest.approx(theirs.low, rel=0.02)
    assert found.high == pytest.approx(theirs.high, rel=0.02)


def test_pairing_makes_differences_sharp() -> None:
    random = np.random.default_rng(3)
    first = {str(i): float(random.random() < 0.5) for i in range(500)}
    # The same answers, but 25 wrong ones become right.
    wrong = [unit for unit, score in first.items() if not score][:25]
    second = first | dict.fromkeys(wrong, 1.0)
    found = difference(metric(first), metric(second))
    assert found.value == pytest.approx(5.0)
    assert 2.8 < found.low < 4 and 6 < found.high < 7.3
    alone = estimate(metric(first))
    assert found.high - found.low < 0.6 * (alone.high - alone.low)
    same = difference(metric(first), metric(first))
    assert (same.value, same.low, same.high) == (0, 0, 0)


def test_only_common_units_are_compared() -> None:
    first, second = {"a": 1.0, "b": 0.0, "x": 1.0}, {"a": 0.0, "b": 0.0, "y": 1.0}
    assert difference(metric(first), metric(second)).value == pytest.approx(-50)
    with pytest.raises(ValueError, match="no sample in common"):
        difference(metric({"a": 1.0}), metric({"b": 1.0}))


@pytest.mark.parametrize(("wins", "losses"), [(0, 0), (1, 0), (5, 5), (12, 3), (3, 12), (300, 340)])
def test_sign_test(wins: int, losses: int) -> None:
    expected = scipy.stats.binomtest(wins, wins + losses).pvalue if wins + losses else 1.0
    assert sign_test(wins, losses) == pytest.approx(expected)


def test_a_part_without_samples_is_no_number() -> None:
    assert math.isnan(value(Metric("m", (Term(100.0, {}, {}),))))
