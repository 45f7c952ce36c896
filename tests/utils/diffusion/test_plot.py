"""Pictures of curves: written, with every curve on them, and with round ticks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageColor

from utils.diffusion.plot import (
    BOTTOM,
    COLOURS,
    LEFT,
    PANEL_HEIGHT,
    RIGHT,
    TOP,
    WIDTH,
    plot,
    ticks,
    timestep_panels,
)
from utils.diffusion.timesteps import TimestepSampler


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.0, 1.0, [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (0.0, 2.7, [0.0, 0.5, 1.0, 1.5, 2.0, 2.5]),
        (0.0, 1200.0, [0.0, 200.0, 400.0, 600.0, 800.0, 1000.0, 1200.0]),
    ],
)
def test_ticks_are_round(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high) == pytest.approx(expected)


def test_curves_are_where_their_values_are(tmp_path: Path) -> None:
    """The first curve is 1 everywhere; the second, twice as high, is at the top of the panel but for 5 %."""
    densities = {"uniform": lambda t: 1.0, "double": lambda t: 2.0}
    sampler = TimestepSampler(shift=3.0)
    panels = timestep_panels(densities, {"none": lambda t: sampler.density(t, 1)})
    plot(panels, tmp_path / "plot.png")
    with Image.open(tmp_path / "plot.png") as picture:
        assert picture.size == (WIDTH, 2 * PANEL_HEIGHT)
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    inside = slice(LEFT + 5, WIDTH - RIGHT - 5)
    for colour, share in ((COLOURS[0], 0.5 / 1.05), (COLOURS[1], 1 / 1.05)):
        is_colour = np.abs(pixels[TOP:PANEL_HEIGHT, inside] - ImageColor.getrgb(colour)).sum(-1) < 60
        height = PANEL_HEIGHT - TOP - BOTTOM
        rows = np.flatnonzero(is_colour.mean(1) > 0.9)
        assert abs(rows.mean() - height * (1 - share)) < 2


def test_what_is_far_above_the_rest_is_cut_off(tmp_path: Path) -> None:
    """A curve of 1 beside a pole at 0 is not flattened to the ground."""
    (panel, _) = timestep_panels({"sigma_sqrt": lambda t: t**-2}, {"none": lambda t: 1.0})
    plot([panel], tmp_path / "plot.png")
    with Image.open(tmp_path / "plot.png") as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    is_curve = np.abs(pixels - ImageColor.getrgb(COLOURS[0])).sum(-1) < 60
    column = is_curve[TOP + 5 :, LEFT + (WIDTH - LEFT - RIGHT) // 4]
    row = np.flatnonzero(column).mean()
    assert 0.1 < row / (PANEL_HEIGHT - TOP - BOTTOM) < 0.9
