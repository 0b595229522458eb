"""How far a metric would move with other samples, and whether two models differ: bootstrap and sign test."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from sg4v_jax.evaluate.benchmark import Metric

RESAMPLES = 1000
_CHUNK_ELEMENTS = 1 << 23
_LEVEL = 0.95


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A metric's value with a 95 % interval of the bootstrap over its units, and how many these are."""

    value: float
    low: float
    high: float
    units: int


def estimate(metric: Metric, *, seed: int = 0) -> Estimate:
    """A metric with its interval; the same input gives the same numbers."""
    table = _Table([metric])
    return Estimate(float(table.once()[0]), *_interval(table.draws(seed)[0]), table.size)


def value(metric: Metric) -> float:
    """A metric's value."""
    return float(_Table([metric]).once()[0])


def difference(first: Metric, second: Metric, *, seed: int = 0) -> Estimate:
    """second - first over the units that both have, paired: both models answer the same draw of units.

    Raises:
      ValueError: they have no unit in common.
    """
    table = _Table([first, second])
    if not table.size:
        raise ValueError(f"{first.name}: the two runs have no sample in common")
    once, draws = table.once(), table.draws(seed)
    return Estimate(float(once[1] - once[0]), *_interval(draws[1] - draws[0]), table.size)


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


class _Table:
    """Numerators and denominators of all terms, a row for each unit that all metrics have."""

    def __init__(self, metrics: Sequence[Metric]):
        names = [{unit: None for term in metric.terms for unit in term.denominator} for metric in metrics]
        units = [unit for unit in names[0] if all(unit in other for other in names[1:])]
        self._metrics, self.size = metrics, len(units)
        columns = [
            [column.get(unit, 0.0) for unit in units]
            for metric in metrics
            for term in metric.terms
            for column in (term.numerator, term.denominator)
        ]
        self._columns = np.array(columns, np.float64).reshape(len(columns), self.size).T

    def once(self) -> np.ndarray:
        """The metrics' values."""
        return self._values(self._columns.sum(0)[None])[:, 0]

    def draws(self, seed: int) -> np.ndarray:
        """The metrics' values on resamples of the units, [metric, draw]."""
        random = np.random.default_rng(seed)
        rows = max(1, min(RESAMPLES, _CHUNK_ELEMENTS // max(1, self.size)))
        sums = []
        for start in range(0, RESAMPLES, rows):
            count = min(rows, RESAMPLES - start)
            drawn = random.integers(0, self.size, (count, self.size), dtype=np.int64)
            drawn += np.arange(count)[:, None] * self.size
            weights = np.bincount(drawn.ravel(), minlength=count * self.size).reshape(count, self.size)
            sums.append(weights.astype(np.float64) @ self._columns)
        return self._values(np.concatenate(sums))

    def _values(self, sums: np.ndarray) -> np.ndarray:
        """[metric, draw] from the columns' sums, [draw, column]."""
        with np.errstate(invalid="ignore", divide="ignore"):
            ratios = list((sums[:, ::2] / sums[:, 1::2]).T)
        values = []
        for metric in self._metrics:
            own, ratios = ratios[: len(metric.terms)], ratios[len(metric.terms) :]
            values.append(metric.combined(own))
        return np.stack(values)


def _interval(draws: np.ndarray) -> tuple[float, float]:
    finite = draws[np.isfinite(draws)]
    if not finite.size:
        return math.nan, math.nan
    tail = 100 * (1 - _LEVEL) / 2
    low, high = np.percentile(finite, [tail, 100 - tail])
    return float(low), float(high)
