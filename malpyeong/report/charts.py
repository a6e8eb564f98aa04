"""Line charts as numbers that a template draws: places in per cent of the plot, ticks, and the values themselves."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Points = tuple[Sequence[int], Sequence[float]]
"""Steps, ascending, and a value at each."""


@dataclass(frozen=True, slots=True)
class Tick:
    """A labelled place on an axis, in per cent from its start."""

    at: float
    label: str


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a chart.

    Attributes:
        name: what it shows.
        steps: steps of the values.
        values: the values.
        path: SVG path of the values in a box of 100 × 100, x to the right and y downwards.
        smooth: the same of a moving average, or "" where there are too few values for one.
    """

    name: str
    steps: Sequence[int]
    values: Sequence[float]
    path: str
    smooth: str


@dataclass(frozen=True, slots=True)
class Chart:
    """Lines over the steps of a run, on common axes."""

    title: str
    note: str
    lines: Sequence[Line]
    x_ticks: Sequence[Tick]
    y_ticks: Sequence[Tick]

    @property
    def values_as_json(self) -> str:
        """Steps and values as shown, for the page's script."""
        lines = [{"steps": list(line.steps), "shown": [number(value) for value in line.values]} for line in self.lines]
        return json.dumps(lines, ensure_ascii=False, separators=(",", ":"))

    @property
    def in_words(self) -> str:
        """What the lines say, for those who do not see them."""
        return "; ".join(
            f"{line.name}: step {line.steps[0]}에서 {number(line.values[0])}, "
            f"step {line.steps[-1]}에서 {number(line.values[-1])}, 최소 {number(min(line.values))}, "
            f"최대 {number(max(line.values))}"
            for line in self.lines
        )


def chart(
    title: str, note: str, curves: Mapping[str, Points], low: float | None = None, average: bool = True
) -> Chart | None:
    """Lay out a chart, or return None where there is nothing to draw.

    Args:
        title: what it shows.
        note: how to read it.
        curves: name → points; values that are no finite numbers are left out.
        low: where the y axis starts at the latest, as 0 for a share.
        average: draw a moving average over twenty values and more; it lags behind where values fall or rise steadily.
    """
    finite = {name: _finite(points) for name, points in curves.items()}
    finite = {name: points for name, points in finite.items() if points[0]}
    if not finite:
        return None
    steps = [step for points in finite.values() for step in points[0]]
    values = [value for points in finite.values() for value in points[1]]
    first, last = min(steps), max(steps)
    y_ticks = _ticks(min(values) if low is None else min(low, *values), max(values), 4)
    bottom, top = y_ticks[0], y_ticks[-1]

    def path(points: Points) -> str:
        places = [
            f"{_per_cent(step, first, last):.2f} {100 - _per_cent(value, bottom, top):.2f}"
            for step, value in zip(*points, strict=True)
        ]
        return f"M{'L'.join(places * 2 if len(places) == 1 else places)}"  # a dot, with round caps

    lines = [
        Line(
            name,
            *points,
            path(points),
            path((points[0], moving_average(points[1]))) if average and len(points[0]) >= 20 else "",
        )
        for name, points in finite.items()
    ]
    x_ticks = [step for step in _ticks(first, last, 5) if first <= step <= last and step == int(step)]
    return Chart(
        title,
        note,
        lines,
        [Tick(_per_cent(step, first, last), f"{step:,.0f}") for step in x_ticks],
        [Tick(_per_cent(value, bottom, top), number(value)) for value in y_ticks],
    )


def moving_average(values: Sequence[float], window: int = 10) -> list[float]:
    """Return the mean of each value and up to ``window - 1`` before it."""
    starts = (max(0, place - window + 1) for place in range(len(values)))
    return [math.fsum(values[start : place + 1]) / (place + 1 - start) for place, start in enumerate(starts)]


def number(value: float | None) -> str:
    """Write a number with four significant digits, or a dash for none."""
    if value is None or not math.isfinite(value):
        return "–"
    if value == int(value) and abs(value) < 1e15:
        return f"{value:,.0f}".replace("-", "−")
    text = f"{value:.4g}" if abs(value) < 1_000 else f"{value:,.0f}"
    return text.replace("-", "−")


def _finite(points: Points) -> Points:
    kept = [(step, value) for step, value in zip(*points, strict=True) if math.isfinite(value)]
    return [step for step, _ in kept], [value for _, value in kept]


def _per_cent(value: float, low: float, high: float) -> float:
    return 100 * (value - low) / (high - low) if high > low else 50.0


def _ticks(low: float, high: float, about: int) -> list[float]:
    """Return round numbers, evenly spaced, from at most ``low`` to at least ``high``."""
    if high <= low:
        low, high = (low - abs(low) / 2, high + abs(high) / 2) if low else (0.0, 1.0)
    power = 10.0 ** math.floor(math.log10((high - low) / about))
    width = next(power * factor for factor in (1, 2, 5, 10) if (high - low) / (power * factor) <= about)
    start, end = math.floor(low / width + 1e-9), math.ceil(high / width - 1e-9)
    return [round(place * width, 12) for place in range(start, end + 1)]
