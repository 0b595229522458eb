"""A radar chart, as the paper's first figure: an axis for each benchmark, a polygon for each model."""

import html
import math
from collections.abc import Mapping, Sequence

_SIZE, _RADIUS = 640, 210
# An axis shows the upper half of its range, the best of the models at the rim.
_FROM = 0.5
_RINGS = (0.25, 0.5, 0.75, 1.0)

Point = tuple[float, float]


def radar_chart(axes: Sequence[str], models: Mapping[str, Sequence[float | None]]) -> str:
    """A chart as SVG; a model without a value on an axis has a gap there.

    Args:
      axes: their labels.
      models: values on each axis by model, in the order of drawing.
    """
    best = [max((row[i] or 0.0 for row in models.values()), default=0.0) for i in range(len(axes))]
    parts = [
        f'<svg class="chart radar" viewBox="0 0 {_SIZE + 160} {_SIZE - 100}" role="img" '
        f'aria-label="{html.escape(", ".join(models))} on {len(axes)} axes">'
    ]
    for ring in _RINGS:
        points = " ".join(
            f"{x:.1f},{y:.1f}" for x, y in (_place(i, ring, len(axes)) for i in range(len(axes)))
        )
        parts.append(f'<polygon class="grid" points="{points}"/>')
    for i, (axis, top) in enumerate(zip(axes, best, strict=True)):
        x, y = _place(i, 1.0, len(axes))
        parts.append(
            f'<line class="grid" x1="{_center()[0]}" y1="{_center()[1]}" x2="{x:.1f}" y2="{y:.1f}"/>'
        )
        parts.append(_label(i, len(axes), axis, f"{top:.1f}"))
    for number, (name, values) in enumerate(models.items()):
        parts.append(_polygon(number, name, values, best))
    return "".join([*parts, "</svg>"])


def _polygon(number: int, name: str, values: Sequence[float | None], best: Sequence[float]) -> str:
    points = [
        _place(i, max(0.0, (value / top - _FROM) / (1 - _FROM)), len(best))
        for i, (value, top) in enumerate(zip(values, best, strict=True))
        if value is not None and top > 0
    ]
    title = f"<title>{html.escape(name)}</title>"
    marks = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.6"/>' for x, y in points)
    outline = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<g class="model m{number}">{title}<polygon points="{outline}"/>{marks}</g>'


def _center() -> Point:
    return (_SIZE + 160) / 2, (_SIZE - 100) / 2


def _place(axis: int, share: float, axes: int) -> Point:
    angle = 2 * math.pi * axis / axes - math.pi / 2
    x, y = _center()
    return x + share * _RADIUS * math.cos(angle), y + share * _RADIUS * math.sin(angle)


def _label(axis: int, axes: int, text: str, best: str) -> str:
    x, y = _place(axis, 1.08, axes)
    side = x - _center()[0]
    anchor = "middle" if abs(side) < 20 else "start" if side > 0 else "end"
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(text)}'
        f'<tspan x="{x:.1f}" dy="1.2em">{best}</tspan></text>'
    )
