"""Charts as SVG: lines with bands, and maps of colours. Colours are told apart by people who see few of them, and text
takes the page's own, light or dark."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf, isfinite

WIDTH, HEIGHT = 440, 250
LEFT, RIGHT, TOP, BOTTOM = 56, 18, 8, 34
MOST_POINTS = 400
"""More points of a line than this cannot be told apart."""
MOST_COLUMNS = 60
LINE = 12
"""The height of a line of text."""
DISTINCT = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Okabe and Ito, "Color Universal Design", 2008."""
DASHES = ("", "6 3", "2 3")
ORDERED = ("#46327e", "#414487", "#35608d", "#2a788e", "#21918c", "#22a884", "#43bf71", "#7ad151", "#a5c92f", "#d2c81f")
"""For what has an order, from dark to light: viridis of matplotlib without its ends."""
LOWER, SAME, HIGHER = (0, 114, 178), (200, 200, 200), (213, 94, 0)

Point = tuple[float, float]


@dataclass(frozen=True)
class Line:
    """A line of a chart.

    Attributes:
        points: (x, y), by x. What is no finite number is left out.
        band: (x, low, high): how sure the line is.
        faint: whether it is only the background of another.
        colour: default: one that no other line has.
    """

    label: str
    points: Sequence[Point]
    band: Sequence[tuple[float, float, float]] = ()
    faint: bool = False
    colour: str | None = None


def line_chart(
    title: str,
    lines: Sequence[Line],
    x_title: str = "step",
    remark: str = "",
    *,
    may_be_logarithmic: bool = True,
    from_zero: bool = False,
) -> str:
    """A figure with axes and a legend; nothing if no line has a point.

    Args:
        may_be_logarithmic: whether values that span more than two powers of ten have a logarithmic axis.
        from_zero: whether the axis of the values begins at 0, so that small changes look small.
    """
    drawn = [(line, _dash(number), line.colour or _colour(number)) for number, line in enumerate(lines)]
    drawn = [(line, dash, colour) for line, dash, colour in drawn if _finite(line.points)]
    if not drawn:
        return ""
    points = [point for line, _, _ in drawn for point in _finite(line.points)]
    bounds = [value for line, _, _ in drawn for _, *band in line.band for value in band if isfinite(value)]
    bounds += [0.0] if from_zero else []
    x_axis = _Axis.over(_from_zero([x for x, _ in points]), LEFT, WIDTH - RIGHT)
    values = [*(y for _, y in points), *bounds]
    y_axis = _Axis.over(values, HEIGHT - BOTTOM, TOP, may_be_logarithmic=may_be_logarithmic)
    scale = ", logarithmic" if y_axis.logarithmic else ""
    parts = [_frame(x_axis, y_axis, x_title)]
    parts += [_band(line, colour, x_axis, y_axis) for line, _, colour in drawn if line.band]
    parts += [_path(line, colour, dash, x_axis, y_axis) for line, dash, colour in drawn]
    legend = "".join(
        f'<li><svg viewBox="0 0 24 8" class="key"><line x1="0" y1="4" x2="24" y2="4" {_stroke(line, colour, dash)}/>'
        f"</svg>{html.escape(line.label)}</li>"
        for line, dash, colour in drawn
        if line.label
    )
    return _figure(title, f"{remark}{scale}".removeprefix(", "), "".join(parts), f'<ul class="legend">{legend}</ul>')


def heat_map(title: str, steps: Sequence[float], rows: Sequence[tuple[str, Sequence[float]]], remark: str = "") -> str:
    """How each row has changed since the first column: blue is less, orange is more. Each cell tells its value.

    Args:
        steps: one for each column.
        rows: label, and a value for each column; those that are no numbers are left empty.
    """
    if not rows or not steps:
        return ""
    every = math.ceil(len(steps) / MOST_COLUMNS)
    columns = sorted({*range(0, len(steps), every), len(steps) - 1})
    ratios = [[_ratio(values[column], values[0]) for column in columns] for _, values in rows]
    found = [0.0, *(ratio for row in ratios for ratio in row if isfinite(ratio))]
    ends, most = (min(found), max(found)), max(map(abs, found)) or 1.0
    width, height = (WIDTH - LEFT - RIGHT) / len(columns), (HEIGHT - TOP - BOTTOM) / len(rows)
    cells = []
    for row, (label, values) in enumerate(rows):
        y = HEIGHT - BOTTOM - (row + 1) * height
        if row % math.ceil(LINE / height) == 0:
            cells.append(_text(LEFT - 6, y + height / 2 + 4, label, "end"))
        for place, column in enumerate(columns):
            if not isfinite(ratio := ratios[row][place]):
                continue
            told = f"{label}, step {_told(steps[column])}: {values[column]:.5g} ({100 * (math.exp(ratio) - 1):+.1f} %)"
            cells.append(
                f'<rect x="{LEFT + place * width:.2f}" y="{y:.2f}" width="{width + 0.3:.2f}" '
                f'height="{height + 0.3:.2f}"'
                f' fill="{_diverging(ratio / most)}"><title>{html.escape(told)}</title></rect>'
            )
    shown = sorted({round(place * (len(columns) - 1) / 4) for place in range(5)})
    cells += [
        _text(LEFT + (place + 0.5) * width, HEIGHT - BOTTOM + 15, _told(steps[columns[place]]), "middle")
        for place in shown
    ]
    cells.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 4, "step", "middle"))
    told = [f"{100 * (math.exp(end) - 1):+.0f} %" if end else "0 %" for end in ends]
    middle = 100 * ends[0] / (ends[0] - ends[1]) if ends[0] != ends[1] else 50
    colours = f"{_diverging(ends[0] / most)}, {_diverging(0.0)} {middle:.0f}%, {_diverging(ends[1] / most)}"
    legend = (
        f'<ul class="legend"><li>{told[0]} <span class="ramp" style="background: linear-gradient(90deg, {colours})">'
        f"</span> {told[1]}, against the first</li></ul>"
    )
    return _figure(title, remark, "".join(cells), legend)


def thinned(points: Sequence[Point], most: int = MOST_POINTS) -> list[Point]:
    """At most so many of the points, with the lowest and the highest of each stretch, so that no peak is lost."""
    if len(points) <= most:
        return list(points)
    kept = {0, len(points) - 1}
    stretches = most // 2 - 1
    for number in range(stretches):
        own = range(number * len(points) // stretches, (number + 1) * len(points) // stretches)
        kept |= {min(own, key=lambda index: points[index][1]), max(own, key=lambda index: points[index][1])}
    return [points[index] for index in sorted(kept)]


def smoothed(points: Sequence[Point]) -> list[Point]:
    """The mean of each point and those before it, which count less the longer ago they are: of n points about n / 25
    are in it. The first ones are means of what there is."""
    points = _finite(points)
    keeps = 1 - 1 / max(1.0, len(points) / 25)
    total = weight = 0.0
    means = []
    for x, y in points:
        total, weight = keeps * total + y, keeps * weight + 1
        means.append((x, total / weight))
    return means


@dataclass(frozen=True)
class _Axis:
    """Values from `low` to `high` on the picture's places from `begin` to `end`."""

    low: float
    high: float
    begin: float
    end: float
    logarithmic: bool = False

    @classmethod
    def over(cls, values: Sequence[float], begin: float, end: float, *, may_be_logarithmic: bool = False) -> _Axis:
        low, high = min(values), max(values)
        if may_be_logarithmic and low > 0 and high / low > 100:
            return cls(low, high, begin, end, logarithmic=True)
        if low == high:
            low, high = (low - abs(low) / 10, high + abs(high) / 10) if low else (-1.0, 1.0)
        return cls(low, high, begin, end)

    def place(self, value: float) -> float:
        as_shown: Callable[[float], float] = math.log10 if self.logarithmic else float
        # A band may reach below what a logarithmic axis has.
        value = min(max(value, self.low), self.high)
        low, high = as_shown(self.low), as_shown(self.high)
        return self.begin + (as_shown(value) - low) / (high - low) * (self.end - self.begin)

    def ticks(self) -> list[float]:
        """About five round values."""
        if self.logarithmic:
            powers = range(math.ceil(math.log10(self.low)), math.floor(math.log10(self.high)) + 1)
            return [10.0**power for power in powers][:: math.ceil(len(powers) / 6)]
        raw = (self.high - self.low) / 5
        power = 10.0 ** math.floor(math.log10(raw))
        step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * 0.999)
        first = math.ceil(self.low / step - 1e-9)
        return [number * step for number in range(first, math.floor(self.high / step + 1e-9) + 1)]


def _frame(x_axis: _Axis, y_axis: _Axis, x_title: str) -> str:
    """Axes, the lines of the ticks and their values."""
    parts = []
    for value in y_axis.ticks():
        y = y_axis.place(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(_text(LEFT - 6, y + 4, _told(value), "end"))
    for value in x_axis.ticks():
        x = x_axis.place(value)
        parts.append(
            f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{HEIGHT - BOTTOM}" y2="{HEIGHT - BOTTOM + 4}"/>'
        )
        parts.append(_text(x, HEIGHT - BOTTOM + 16, _told(value), "middle"))
    parts.append(f'<path class="axis" d="M{LEFT} {TOP}V{HEIGHT - BOTTOM}H{WIDTH - RIGHT}" fill="none"/>')
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 4, x_title, "middle"))
    return "".join(parts)


def _path(line: Line, colour: str, dash: str, x_axis: _Axis, y_axis: _Axis) -> str:
    points = thinned(_finite(line.points))
    if len(points) == 1:
        ((x, y),) = points
        return f'<circle cx="{x_axis.place(x):.1f}" cy="{y_axis.place(y):.1f}" r="3" fill="{colour}"/>'
    placed = " ".join(f"{x_axis.place(x):.1f},{y_axis.place(y):.1f}" for x, y in points)
    return f'<polyline points="{placed}" fill="none" {_stroke(line, colour, dash)}/>'


def _band(line: Line, colour: str, x_axis: _Axis, y_axis: _Axis) -> str:
    sound = [one for one in line.band if all(map(isfinite, one))]
    upper = thinned([(x, high) for x, _, high in sound])
    lower = thinned([(x, low) for x, low, _ in sound])[::-1]
    placed = " ".join(f"{x_axis.place(x):.1f},{y_axis.place(y):.1f}" for x, y in [*upper, *lower])
    return f'<polygon points="{placed}" fill="{colour}" fill-opacity="0.18"/>'


def _stroke(line: Line, colour: str, dash: str) -> str:
    width, opacity = ("1", ' stroke-opacity="0.3"') if line.faint else ("1.8", "")
    dashes = f' stroke-dasharray="{dash}"' if dash else ""
    return f'stroke="{colour}" stroke-width="{width}"{opacity}{dashes}'


def _figure(title: str, remark: str, drawing: str, legend: str) -> str:
    name = html.escape(title)
    beside = f' <span class="remark">{html.escape(remark)}</span>' if remark else ""
    return (
        f'<figure class="chart"><figcaption>{name}{beside}</figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(title, quote=True)}">{drawing}</svg>'
        f"{legend}</figure>"
    )


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(text)}</text>'


def _from_zero(steps: Sequence[float]) -> list[float]:
    """The steps, with 0 if they begin near it."""
    return [*steps, 0.0] if 0 <= min(steps) <= 0.05 * max(steps) else list(steps)


def _told(value: float) -> str:
    """0, 0.25, 1500, 2e-05"""
    if value == 0 or 1e-3 <= abs(value) < 1e6:
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:.0f}"
    return f"{value:.2g}"


def _finite(points: Sequence[Point]) -> list[Point]:
    return [(x, y) for x, y in points if isfinite(y)]


def _ratio(value: float, first: float) -> float:
    """The logarithm of the quotient, in which twice and half are alike."""
    return math.log(value / first) if 0 < value < inf and 0 < first < inf else math.nan


def _diverging(share: float) -> str:
    """The colour from -1 over 0 to 1."""
    end = LOWER if share < 0 else HIGHER
    mixed = (round(same + abs(share) * (other - same)) for same, other in zip(SAME, end, strict=True))
    return "#" + "".join(f"{part:02x}" for part in mixed)


def _colour(number: int) -> str:
    return DISTINCT[number % len(DISTINCT)]


def _dash(number: int) -> str:
    return DASHES[number // len(DISTINCT) % len(DASHES)]
