"""Geometry of the report's two figures: line charts and dot plots. Positions are percent of the plot, y downwards.

Text stays HTML and only lines are SVG, stretched to the plot, so that a chart is as readable on a phone as on a desk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import ceil, floor, isfinite, log10


@dataclass(frozen=True)
class Tick:
    """A gridline: where it is and what it says."""

    position: float
    text: str


@dataclass(frozen=True)
class Axis:
    """A linear scale from `low` to `high` with round ticks."""

    low: float
    high: float
    step: float

    @classmethod
    def fitting(cls, values: Sequence[float], *, ticks: int = 5) -> Axis:
        """The axis around all finite `values` with about `ticks` steps of 1, 2 or 5 times a power of 10."""
        finite = [value for value in values if isfinite(value)] or [0.0, 1.0]
        low, high = min(finite), max(finite)
        if low == high:
            low, high = low - 0.5, high + 0.5
        rough = (high - low) / ticks
        power = 10.0 ** floor(log10(rough))
        step = power * next(factor for factor in (1.0, 2.0, 5.0, 10.0) if factor * power >= rough * (1 - 1e-9))
        return cls(floor(low / step + 1e-9) * step, ceil(high / step - 1e-9) * step, step)

    def place(self, value: float) -> float:
        """Position of `value` in percent from the low end."""
        return 100.0 * (value - self.low) / (self.high - self.low)

    @property
    def ticks(self) -> list[Tick]:
        """All round values of the axis with their texts."""
        digits = max(0, -floor(log10(self.step) + 1e-9))
        count = round((self.high - self.low) / self.step)
        values = [self.low + index * self.step for index in range(count + 1)]
        return [Tick(self.place(value), signed_minus(f"{value + 0.0:.{digits}f}")) for value in values]


def signed_minus(text: str) -> str:
    """Shows a negative number with a minus sign of a digit's width, and never `-0`."""
    if text.startswith("-") and not text.strip("-0."):
        text = text[1:]
    return text.replace("-", "\N{MINUS SIGN}")


@dataclass(frozen=True)
class Line:
    """One curve; NaN values break it.

    Attributes:
        label: Name in the legend.
        x: Positions, in the order in which the points are joined.
        y: Values.
        names: What each point is called, written beside it; empty where the position says it all.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    names: Sequence[str] = ()


@dataclass(frozen=True)
class LineChart:
    """Curves over training steps, or over models where the points have names.

    Attributes:
        title: Headline of the chart.
        lines: The curves, at most six; each gets a colour and a dash pattern of its own.
        unit: What the values are.
        x_label: What the positions are.
        note: A sentence below.
        zero: Whether to include zero and draw it as a stronger line.
    """

    title: str
    lines: Sequence[Line]
    unit: str = ""
    x_label: str = "step"
    note: str = ""
    zero: bool = False
    kind: str = field(default="line_chart", init=False)

    @property
    def x_axis(self) -> Axis:
        """The horizontal axis."""
        return Axis.fitting([value for line in self.lines for value in line.x], ticks=4)

    @property
    def y_axis(self) -> Axis:
        """The vertical axis."""
        values = [value for line in self.lines for value in line.y]
        return Axis.fitting([*values, 0.0] if self.zero else values)

    def points(self, line: Line) -> list[tuple[float, float]]:
        """Finite points of a curve in percent, y downwards."""
        return [point for run in self._runs(line) for point in run]

    @property
    def captions(self) -> list[tuple[float, float, str]]:
        """Where the names of finite points belong: percent from the left and from the bottom, and the name, once each
        where curves meet."""
        across, down = self.x_axis, self.y_axis
        places = [
            (across.place(x), down.place(y), name)
            for line in self.lines
            for x, y, name in zip(line.x, line.y, line.names, strict=bool(line.names))
            if isfinite(y)
        ]
        return list(dict.fromkeys(places))

    def path(self, line: Line) -> str:
        """The curve as SVG path data; a point between two gaps becomes a dot."""
        runs = (" L".join(f"{x:.2f} {y:.2f}" for x, y in run) for run in self._runs(line))
        return " ".join(f"M{run}" for run in runs)

    def dots(self, line: Line) -> str:
        """Path data that draws each point as a round cap; empty for long curves."""
        points = self.points(line)
        return " ".join(f"M{x:.2f} {y:.2f}h0" for x, y in points) if len(points) <= 24 else ""

    def _runs(self, line: Line) -> list[list[tuple[float, float]]]:
        across, down = self.x_axis, self.y_axis
        runs: list[list[tuple[float, float]]] = [[]]
        for x, y in zip(line.x, line.y, strict=True):
            if isfinite(y):
                runs[-1].append((across.place(x), 100.0 - down.place(y)))
            elif runs[-1]:
                runs.append([])
        return [run for run in runs if run]


@dataclass(frozen=True)
class Mark:
    """One value of a dot plot row, with its interval where it has one.

    Attributes:
        series: Index into the plot's `series`.
        value: Where the mark is.
        low, high: Ends of its 95 % interval, NaN without one.
        text: How the value is written.
    """

    series: int
    value: float
    text: str
    low: float = float("nan")
    high: float = float("nan")

    @property
    def has_interval(self) -> bool:
        """Whether both ends are known."""
        return isfinite(self.low) and isfinite(self.high)


@dataclass(frozen=True)
class DotRow:
    """A labelled row of marks; `remark` is small print under the label."""

    label: str
    marks: Sequence[Mark]
    remark: str = ""


@dataclass(frozen=True)
class DotPlot:
    """Rows of values on one scale, e.g. accuracies of a judge and its baselines.

    Attributes:
        title: Headline of the plot.
        series: Names of the marks, in legend order; the first is drawn as a filled dot.
        rows: Rows from top to bottom.
        reference: Value of a vertical line, e.g. chance or zero.
        reference_label: What the line means.
        limits: Ends of the scale; fitted to the marks when None.
        note: A sentence below.
    """

    title: str
    series: Sequence[str]
    rows: Sequence[DotRow]
    reference: float | None = None
    reference_label: str = ""
    limits: tuple[float, float] | None = None
    note: str = ""
    kind: str = field(default="dot_plot", init=False)

    @property
    def axis(self) -> Axis:
        """The horizontal axis."""
        if self.limits is not None:
            return Axis.fitting(self.limits)
        values = [value for row in self.rows for mark in row.marks for value in (mark.value, mark.low, mark.high)]
        return Axis.fitting(values if self.reference is None else [*values, self.reference])
