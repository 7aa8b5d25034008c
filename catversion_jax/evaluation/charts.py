"""Small line charts: numbers to SVG coordinates; the template draws them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

WIDTH, HEIGHT = 360, 150
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 8, 8, 22


@dataclasses.dataclass(frozen=True)
class Line:
    """One curve: its legend and ``x,y x,y ...`` as SVG's polyline wants it."""

    label: str
    points: str
    dots: tuple[tuple[float, float, str], ...]


@dataclasses.dataclass(frozen=True)
class Chart:
    """A chart of equally scaled curves; ticks are (position, text)."""

    title: str
    lines: tuple[Line, ...]
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    width: int = WIDTH
    height: int = HEIGHT


@dataclasses.dataclass(frozen=True)
class Frontier:
    """Points joined by a line, each with its label; ticks are (position, text)."""

    points: str
    dots: tuple[tuple[float, float, str], ...]
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    width: int = 2 * WIDTH
    height: int = 2 * HEIGHT


def frontier_chart(points: Sequence[tuple[float | None, float | None, str]]) -> Frontier | None:
    """A plot of (x, y, label); None with fewer than two points."""
    known = [(x, y, label) for x, y, label in points if x is not None and y is not None]
    if len(known) < 2:
        return None
    width, height = 2 * WIDTH, 2 * HEIGHT
    at_x = _scale([x for x, _, _ in known], _LEFT, width - _RIGHT)
    at_y = _scale([y for _, y, _ in known], height - _BOTTOM, _TOP)
    return Frontier(
        " ".join(f"{at_x[x]},{at_y[y]}" for x, y, _ in known),
        tuple((at_x[x], at_y[y], label) for x, y, label in known),
        tuple((at_x[x], f"{x:.3f}") for x in (min(at_x), max(at_x))),
        tuple((at_y[y], f"{y:.3f}") for y in (min(at_y), max(at_y))),
    )


def _scale(values: Sequence[float], begin: float, end: float) -> dict[float, float]:
    """The position of each value between ``begin`` and ``end``, 12 % of the range left free."""
    low, high = min(values), max(values)
    margin = 0.12 * (high - low) or 0.01
    span = high - low + 2 * margin
    return {v: round(begin + (v - low + margin) / span * (end - begin), 1) for v in values}


def line_chart(
    title: str, series: Mapping[str, Sequence[tuple[float, float | None]]]
) -> Chart | None:
    """A chart of curves over the training step; None where no curve has two points."""
    known = {
        label: [(x, y) for x, y in points if y is not None] for label, points in series.items()
    }
    known = {label: points for label, points in known.items() if len(points) >= 2}
    if not known:
        return None
    xs = [x for points in known.values() for x, _ in points]
    ys = [y for points in known.values() for _, y in points]
    x_low, x_high, y_low, y_high = min(xs), max(xs), min(ys), max(ys)
    padding = 0.08 * (y_high - y_low) or 0.01
    y_low, y_high = y_low - padding, y_high + padding

    def at_x(x: float) -> float:
        share = (x - x_low) / (x_high - x_low) if x_high > x_low else 0.5
        return round(_LEFT + share * (WIDTH - _LEFT - _RIGHT), 1)

    def at_y(y: float) -> float:
        share = (y - y_low) / (y_high - y_low)
        return round(HEIGHT - _BOTTOM - share * (HEIGHT - _TOP - _BOTTOM), 1)

    lines = tuple(
        Line(
            label,
            " ".join(f"{at_x(x)},{at_y(y)}" for x, y in points),
            tuple((at_x(x), at_y(y), f"{label}, step {x:g}: {y:.4f}") for x, y in points),
        )
        for label, points in known.items()
    )
    middle = (y_low + y_high) / 2
    return Chart(
        title,
        lines,
        tuple((at_x(x), f"{x:g}") for x in sorted({x_low, x_high})),
        tuple((at_y(y), f"{y:.3f}") for y in (y_low + padding, middle, y_high - padding)),
    )
