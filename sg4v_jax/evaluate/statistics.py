"""How far a metric would move with other samples, and whether two models differ: bootstrap and sign test."""

import dataclasses
import math
from collections.abc import Iterator, Sequence

import numpy as np

from sg4v_jax.evaluate.benchmark import Metric

RESAMPLES = 1000
_CHUNK_ELEMENTS = 1 << 23
_LEVEL = 0.95


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A metric's value with a 95 % interval of the bootstrap over its units."""

    value: float
    low: float
    high: float


def estimate(metric: Metric, *, seed: int = 0) -> Estimate:
    """A metric with its interval; the same input gives the same numbers."""
    units = _units([metric])
    draws = np.concatenate(list(_draws([metric], units, seed)), axis=-1)[0]
    return Estimate(value(metric), *_interval(draws))


def value(metric: Metric) -> float:
    """A metric's value."""
    return float(next(_values([metric], _units([metric]), np.ones((1, 1))))[0, 0])


def difference(first: Metric, second: Metric, *, seed: int = 0) -> Estimate:
    """second - first over the units that both have, paired: both models answer the same draw of units.

    Raises:
      ValueError: they have no unit in common.
    """
    units = _units([first, second])
    if not units:
        raise ValueError(f"{first.name}: the two runs have no sample in common")
    draws = np.concatenate(list(_draws([first, second], units, seed)), axis=-1)
    once = next(_values([first, second], units, np.ones((1, len(units)))))
    return Estimate(float(once[1, 0] - once[0, 0]), *_interval(draws[1] - draws[0]))


def sign_test(wins: int, losses: int) -> float:
    """Two-sided p of so uneven a split if both sides were equally likely; McNemar's exact test."""
    total, fewer = wins + losses, min(wins, losses)
    if not total:
        return 1.0
    logs = [
        math.lgamma(total + 1) - math.lgamma(k + 1) - math.lgamma(total - k + 1) - total * math.log(2)
        for k in range(fewer + 1)
    ]
    return min(1.0, 2 * math.fsum(map(math.exp, logs)))


def _units(metrics: Sequence[Metric]) -> list[str]:
    """Units that all metrics have, in the first one's order."""
    names = [{unit: None for term in metric.terms for unit in term.denominator} for metric in metrics]
    return [unit for unit in names[0] if all(unit in other for other in names[1:])]


def _interval(draws: np.ndarray) -> tuple[float, float]:
    finite = draws[np.isfinite(draws)]
    if not finite.size:
        return math.nan, math.nan
    tail = 100 * (1 - _LEVEL) / 2
    low, high = np.percentile(finite, [tail, 100 - tail])
    return float(low), float(high)


def _draws(metrics: Sequence[Metric], units: Sequence[str], seed: int) -> Iterator[np.ndarray]:
    """Values of the metrics, [metric, draw], on resamples of the units, some draws at a time."""
    random = np.random.default_rng(seed)
    rows = max(1, min(RESAMPLES, _CHUNK_ELEMENTS // max(1, len(units))))
    for start in range(0, RESAMPLES, rows):
        count = min(rows, RESAMPLES - start)
        drawn = random.integers(0, len(units), (count, len(units)), dtype=np.int32)
        offsets = np.arange(count, dtype=np.int64)[:, None] * len(units)
        weights = np.bincount((drawn + offsets).ravel(), minlength=count * len(units))
        yield from _values(metrics, units, weights.reshape(count, len(units)).astype(np.float64))


def _values(metrics: Sequence[Metric], units: Sequence[str], weights: np.ndarray) -> Iterator[np.ndarray]:
    """[metric, draw] for weights [draw, unit]; units may be weighted all alike by [1, 1]."""
    rows = []
    for metric in metrics:
        ratios = []
        for term in metric.terms:
            numerator, denominator = (
                (weights * np.array([column.get(unit, 0.0) for unit in units])).sum(-1)
                if weights.shape[-1] == 1
                else weights @ np.array([column.get(unit, 0.0) for unit in units])
                for column in (term.numerator, term.denominator)
            )
            with np.errstate(invalid="ignore", divide="ignore"):
                ratios.append(numerator / denominator)
        rows.append(metric.combined(ratios))
    yield np.stack(rows)
