"""Charts as inline SVG: a few strings, no library, colours from the page's style sheet."""

import html
import itertools
import math
from collections.abc import Sequence

Point = tuple[float, float]

_WIDTH, _HEIGHT = 460, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 12, 12, 38
_SMOOTH_FROM = 20  # points; fewer are drawn as they are


def usable(points: Sequence[Point]) -> list[Point]:
    """The points that a logarithmic axis can show: a diverged run has others."""
    return [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y) and y > 0]


def log_bounds(values: Sequence[float]) -> tuple[float, float]:
    """The bounds of an axis that shows all values, on ticks of `log_ticks`."""
    if not values:
        return 0.1, 1.0
    low, high = _step(min(values), up=False), _step(max(values), up=True)
    return (low, high) if low < high else (low / 2, high * 2)


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times the powers of ten from low to high; only the powers if these are many."""
    exponents = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2)
    steps = (1, 2, 5) if math.log10(high / low) <= 3 else (1,)
    ticks = [step * 10.0**exponent for exponent in exponents for step in steps]
    return [tick for tick in ticks if low * 0.999 <= tick <= high * 1.001]


def loss_chart(title: str, points: Sequence[Point], bounds: tuple[float, float]) -> str:
    """A loss over steps with a logarithmic axis, pale as measured and bold as running mean.

    Args:
      title: what a screen reader says of it.
      points: (step, loss), in order.
      bounds: of the loss axis; the same for all charts that are to be compared.
    """
    points = usable(points)
    last = max([x for x, _ in points], default=1.0) or 1.0
    spans = math.log(bounds[1] / bounds[0])

    def place(point: Point) -> Point:
        x = _LEFT + (_WIDTH - _LEFT - _RIGHT) * point[0] / last
        y = _TOP + (_HEIGHT - _TOP - _BOTTOM) * (1 - math.log(point[1] / bounds[0]) / spans)
        return x, y

    parts = [
        f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{html.escape(title)}">'
    ]
    for tick in log_ticks(*bounds):
        y = place((0, tick))[1]
        parts.append(_line("grid", _LEFT, y, _WIDTH - _RIGHT, y))
        parts.append(_text(_LEFT - 7, y + 4, "end", f"{tick:g}"))
    for tick in _linear_ticks(last):
        x = place((tick, bounds[0]))[0]
        parts.append(_line("axis", x, _HEIGHT - _BOTTOM, x, _HEIGHT - _BOTTOM + 4))
        parts.append(_text(x, _HEIGHT - _BOTTOM + 17, "middle", f"{tick:g}"))
    parts.append(_line("axis", _LEFT, _HEIGHT - _BOTTOM, _WIDTH - _RIGHT, _HEIGHT - _BOTTOM))
    parts.append(_text((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 4, "middle", "step"))
    smooth = len(points) >= _SMOOTH_FROM
    parts.append(_polyline("raw" if smooth else "mean", [place(point) for point in points]))
    if smooth:
        parts.append(_polyline("mean", [place(point) for point in _running_mean(points)]))
    return "".join([*parts, "</svg>"])


def histogram(title: str, unit: str, edges: Sequence[float], series: Sequence[Sequence[float]]) -> str:
    """Shares by bin: the first series as bars, others as outlines over them.

    Args:
      title: what a screen reader says of it.
      unit: below the axis.
      edges: of the bins, one more than there are bins, in order.
      series: a share for every bin, for each of one or more sets.
    """
    most = max((share for shares in series for share in shares), default=0) or 1.0
    low, high = edges[0], edges[-1]
    bottom = _HEIGHT - _BOTTOM

    def place(value: float, share: float) -> Point:
        x = _LEFT + (_WIDTH - _LEFT - _RIGHT) * (value - low) / ((high - low) or 1)
        return x, bottom - (bottom - _TOP) * share / most

    parts = [
        f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{html.escape(title)}">'
    ]
    for tick in _linear_ticks(most):
        y = place(low, tick)[1]
        parts.append(_line("grid", _LEFT, y, _WIDTH - _RIGHT, y))
        parts.append(_text(_LEFT - 7, y + 4, "end", f"{tick:.3g}" if most < 0.02 else f"{tick:.0%}"))
    for (left, right), share in zip(itertools.pairwise(edges), series[0], strict=True):
        (x1, y), (x2, _) = place(left, share), place(right, share)
        name = f"<title>{left:g} to {right:g}: {share:.2%}</title>"
        parts.append(
            f'<rect x="{x1:.1f}" y="{y:.1f}" width="{max(x2 - x1 - 1, 0.5):.1f}" '
            f'height="{bottom - y:.1f}">{name}</rect>'
        )
    for shares in series[1:]:
        steps = [
            place(edge, share)
            for (left, right), share in zip(itertools.pairwise(edges), shares, strict=True)
            for edge in (left, right)
        ]
        parts.append(_polyline("other", [place(low, 0), *steps, place(high, 0)]))
    for tick in _linear_ticks(high):
        if tick >= low:
            x = place(tick, 0)[0]
            parts.append(_line("axis", x, bottom, x, bottom + 4))
            parts.append(_text(x, bottom + 17, "middle", f"{tick:g}"))
    parts.append(_line("axis", _LEFT, bottom, _WIDTH - _RIGHT, bottom))
    parts.append(_text((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 4, "middle", unit))
    return "".join([*parts, "</svg>"])


def _step(value: float, *, up: bool) -> float:
    """The nearest 1, 2 or 5 times a power of ten that is not below (or not above) the value."""
    power = 10.0 ** math.floor(math.log10(value))
    candidates = [step * power for step in (1, 2, 5, 10)]
    return min(c for c in candidates if c >= value) if up else max(c for c in candidates if c <= value)


def _linear_ticks(last: float) -> list[float]:
    """From zero on, about five round numbers."""
    distance = _step(last / 5, up=True)
    return [count * distance for count in range(int(last / distance) + 1)]


def _running_mean(points: Sequence[Point], reach: int = 4) -> list[Point]:
    means = []
    for index, (x, _) in enumerate(points):
        # The window shrinks towards both ends, so that it stays centred and adds no lag.
        radius = min(reach, index, len(points) - 1 - index)
        window = [y for _, y in points[index - radius : index + radius + 1]]
        means.append((x, sum(window) / len(window)))
    return means


def _line(name: str, x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="{name}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _text(x: float, y: float, anchor: str, text: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(text)}</text>'


def _polyline(name: str, points: Sequence[Point]) -> str:
    if len(points) == 1:
        return f'<circle class="{name}" cx="{points[0][0]:.1f}" cy="{points[0][1]:.1f}" r="3"/>'
    return f'<polyline class="{name}" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}"/>'
