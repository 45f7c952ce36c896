"""Pictures of curves, drawn with Pillow: the noise levels that a run trains, and what their losses count."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

WIDTH, PANEL_HEIGHT = 960, 420
LEFT, RIGHT, TOP, BOTTOM = 90, 30, 50, 60
# Names of curves form a row above the panel, right of its title; LETTER is about the width of a letter.
LEGEND_LEFT, LEGEND_GAP, LETTER = 190, 20, 8
# Drawn larger and scaled down, for lines without steps.
OVERSAMPLING = 2
INK, FAINT, PAPER = "#222222", "#dddddd", "#ffffff"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
TICKS, POINTS = 6, 1000
# Values above this multiple of the median are cut off: 1 / sigma^2 at sigma 0 would flatten the rest.
HIGHEST_OVER_MEDIAN = 12.0


@dataclass(frozen=True)
class Curve:
    """`ys` over `xs`, which rise."""

    name: str
    xs: Sequence[float]
    ys: Sequence[float]


@dataclass(frozen=True)
class Panel:
    """Curves that share two axes; that of y starts at 0.

    Attributes:
        x_range: what the axis of x shows.
    """

    title: str
    x_label: str
    y_label: str
    curves: Sequence[Curve]
    x_range: tuple[float, float]


def timestep_panels(
    densities: Mapping[str, Callable[[float], float]], weights: Mapping[str, Callable[[float], float]]
) -> list[Panel]:
    """Two panels over the noise levels t in (0, 1): how often t is drawn, and what its loss counts.

    Args:
        densities, weights: by the name in the legend, each a function of t.
    """
    ts = [(number + 0.5) / POINTS for number in range(POINTS)]
    return [
        Panel(title, "t (0 clean, 1 noise)", y_label, [_sampled(*entry, ts) for entry in functions.items()], (0.0, 1.0))
        for title, y_label, functions in (
            ("Timesteps drawn", "density", densities),
            ("Weight of the loss", "factor", weights),
        )
    ]


def _sampled(name: str, function: Callable[[float], float], xs: Sequence[float]) -> Curve:
    return Curve(name, xs, [function(x) for x in xs])


def plot(panels: Sequence[Panel], path: Path) -> None:
    """Writes the panels, one below the other, as a picture in the format that the file's name ends in."""
    picture = Image.new("RGB", (WIDTH * OVERSAMPLING, PANEL_HEIGHT * len(panels) * OVERSAMPLING), PAPER)
    draw = ImageDraw.Draw(picture)
    for index, panel in enumerate(panels):
        _Frame.around(panel, index * PANEL_HEIGHT).draw(draw, panel)
    picture.resize((WIDTH, PANEL_HEIGHT * len(panels)), Image.Resampling.LANCZOS).save(path)


def ticks(low: float, high: float) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) from `low` to `high`, about TICKS of them."""
    rough = (high - low) / TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1.0, 2.0, 5.0, 10.0) if factor * power >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


@dataclass(frozen=True)
class _Frame:
    """Where the axes of a panel are on the picture, and what range they show."""

    top: int
    low_x: float
    high_x: float
    high_y: float

    @classmethod
    def around(cls, panel: Panel, top: int) -> _Frame:
        ys = sorted(y for curve in panel.curves for y in curve.ys if math.isfinite(y))
        assert ys, f"nothing to draw in {panel.title}"
        median = ys[len(ys) // 2]
        high_y = min(ys[-1], HIGHEST_OVER_MEDIAN * median) if median > 0 else ys[-1]
        return cls(top, *panel.x_range, 1.05 * high_y or 1.0)

    def draw(self, draw: ImageDraw.ImageDraw, panel: Panel) -> None:
        self._axes(draw, panel)
        legend = LEGEND_LEFT
        for index, curve in enumerate(panel.curves):
            colour = COLOURS[index % len(COLOURS)]
            points = [self._place(x, min(y, self.high_y)) for x, y in zip(curve.xs, curve.ys, strict=True)]
            draw.line(points, fill=colour, width=2 * OVERSAMPLING, joint="curve")
            cut = " (cut off)" if max(curve.ys) > self.high_y else ""
            self._text(draw, curve.name + cut, self._place(self.low_x, self.high_y), (legend, -12), "ls", colour)
            legend += len(curve.name + cut) * LETTER + LEGEND_GAP

    def _axes(self, draw: ImageDraw.ImageDraw, panel: Panel) -> None:
        for x in ticks(self.low_x, self.high_x):
            draw.line([self._place(x, 0.0), self._place(x, self.high_y)], fill=FAINT, width=OVERSAMPLING)
            self._text(draw, f"{x:g}", self._place(x, 0.0), (0, 8), "ma")
        for y in ticks(0.0, self.high_y):
            draw.line([self._place(self.low_x, y), self._place(self.high_x, y)], fill=FAINT, width=OVERSAMPLING)
            self._text(draw, f"{y:g}", self._place(self.low_x, y), (-8, 0), "rm")
        corners = [(self.low_x, self.high_y), (self.low_x, 0.0), (self.high_x, 0.0)]
        draw.line([self._place(*corner) for corner in corners], fill=INK, width=OVERSAMPLING)
        middle = 0.5 * (self.low_x + self.high_x)
        self._text(draw, panel.x_label, self._place(middle, 0.0), (0, 30), "ma")
        self._text(draw, panel.title, self._place(self.low_x, self.high_y), (0, -12), "ls", size=18)
        self._text(draw, panel.y_label, self._place(self.high_x, self.high_y), (0, -12), "rs")

    def _place(self, x: float, y: float) -> tuple[float, float]:
        """Pixels of a point."""
        across = (x - self.low_x) / (self.high_x - self.low_x) * (WIDTH - LEFT - RIGHT)
        up = y / self.high_y * (PANEL_HEIGHT - TOP - BOTTOM)
        return (LEFT + across) * OVERSAMPLING, (self.top + PANEL_HEIGHT - BOTTOM - up) * OVERSAMPLING

    @staticmethod
    def _text(
        draw: ImageDraw.ImageDraw,
        text: str,
        position: tuple[float, float],
        offset: tuple[int, int],
        anchor: str,
        colour: str = INK,
        size: int = 14,
    ) -> None:
        x, y = (start + OVERSAMPLING * move for start, move in zip(position, offset, strict=True))
        draw.text((x, y), text, fill=colour, anchor=anchor, font=ImageFont.load_default(size * OVERSAMPLING))
