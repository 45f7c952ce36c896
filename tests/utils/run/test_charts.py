"""Charts show the numbers where they belong."""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import pytest

from utils.run.charts import (
    BOTTOM,
    HEIGHT,
    LEFT,
    MOST_COLUMNS,
    RIGHT,
    TOP,
    WIDTH,
    Line,
    heat_map,
    line_chart,
    smoothed,
    thinned,
)

NAN = math.nan


def drawn(chart: str) -> ElementTree.Element:
    return ElementTree.fromstring(chart)


def polylines(chart: str) -> list[list[tuple[float, float]]]:
    found = [line.get("points").split() for line in drawn(chart).iter("polyline")]
    return [[tuple(map(float, point.split(","))) for point in points] for points in found]


def test_points_are_placed_between_the_ends_of_the_axes() -> None:
    chart = line_chart("loss <raw>", [Line("a & b", [(0, 1.0), (50, NAN), (50, 2.0), (100, 3.0)])])
    middle = (LEFT + WIDTH - RIGHT) / 2, (TOP + HEIGHT - BOTTOM) / 2
    assert polylines(chart) == [[(LEFT, HEIGHT - BOTTOM), pytest.approx(middle), (WIDTH - RIGHT, TOP)]]
    texts = [text.text for text in drawn(chart).iter("text")]
    assert [text for text in texts if text != "step"] == [
        "1",
        "1.5",
        "2",
        "2.5",
        "3",
        "0",
        "20",
        "40",
        "60",
        "80",
        "100",
    ]
    assert "a & b" in "".join(drawn(chart).itertext())


def test_a_wide_range_has_a_logarithmic_axis_if_it_may() -> None:
    line = Line("", [(1, 1e-4), (2, 1e-2), (3, 1.0)])
    (points,) = polylines(line_chart("norm", [line]))
    assert points[1][1] == pytest.approx((TOP + HEIGHT - BOTTOM) / 2)
    (points,) = polylines(line_chart("rate", [line], may_be_logarithmic=False))
    assert points[1][1] == pytest.approx(HEIGHT - BOTTOM, abs=3)


@pytest.mark.parametrize("points", [[], [(1, NAN)]])
def test_without_numbers_there_is_no_chart(points: list) -> None:
    assert line_chart("loss", [Line("a", points)]) == ""


@pytest.mark.parametrize("value", [0.0, -3.0, 1e-30, 1e30])
def test_one_point_and_one_value_are_drawn(value: float) -> None:
    assert len(list(drawn(line_chart("loss", [Line("a", [(5, value)])])).iter("circle"))) == 1
    assert polylines(line_chart("loss", [Line("a", [(5, value), (6, value)])]))


def test_a_band_is_drawn_around_its_line() -> None:
    line = Line("a", [(0, 2.0), (10, 2.0)], band=[(0, 1.0, 3.0), (10, 1.0, 3.0)])
    (area,) = drawn(line_chart("loss", [line])).iter("polygon")
    assert {point.split(",")[1] for point in area.get("points").split()} == {f"{TOP}.0", f"{HEIGHT - BOTTOM}.0"}


def test_thinning_keeps_every_peak_and_the_ends() -> None:
    points = [(float(x), 100.0 if x == 70_001 else -7.0 if x == 12_345 else 1.0) for x in range(100_000)]
    kept = thinned(points, 400)
    assert len(kept) <= 400 and kept[0] == points[0] and kept[-1] == points[-1]
    assert points[70_001] in kept and points[12_345] in kept and kept == sorted(kept)
    assert thinned(points[:400], 400) == points[:400]


def test_smoothing_is_a_mean_of_what_was_before() -> None:
    assert smoothed([(0, 1.0), (1, NAN), (2, 3.0)]) == [(0, 1.0), (2, 3.0)]
    # Of 50 points 2 are in the mean: each counts half of the one after it.
    means = smoothed([(0, 8.0), (1, 2.0), *((x, 2.0) for x in range(2, 50))])
    assert means[1][1] == pytest.approx((8 / 2 + 2) / (1 + 1 / 2))
    assert means[-1][1] == pytest.approx(2.0)


def test_a_heat_map_tells_each_change() -> None:
    chart = heat_map("held by noise level", [0, 10, 20], [("0.10", [4.0, 2.0, NAN]), ("0.90", [1.0, 1.0, 1.5])])
    cells = {cell[0].text: cell.get("fill") for cell in drawn(chart).iter("rect")}
    assert cells == {
        "0.10, step 0: 4 (+0.0 %)": "#c8c8c8",
        "0.10, step 10: 2 (-50.0 %)": "#0072b2",
        "0.90, step 0: 1 (+0.0 %)": "#c8c8c8",
        "0.90, step 10: 1 (+0.0 %)": "#c8c8c8",
        "0.90, step 20: 1.5 (+50.0 %)": cells["0.90, step 20: 1.5 (+50.0 %)"],
    }
    assert "-50 %" in chart and "+50 %, against the first" in chart


def test_a_heat_map_of_many_steps_has_the_last() -> None:
    chart = heat_map("held", range(1000), [("0.50", [1.0] * 1000)])
    assert len(re.findall("<rect", chart)) <= MOST_COLUMNS + 1 and "step 999:" in chart


def test_rows_of_a_heat_map_that_are_many_have_few_labels() -> None:
    def labels(count: int) -> list[str]:
        chart = heat_map("norms", [1, 2], [(f"row {row}", [1.0, 2.0]) for row in range(count)])
        return [text.text for text in drawn(chart).iter("text") if (text.text or "").startswith("row")]

    assert len(labels(10)) == 10
    assert labels(57)[:2] == ["row 0", "row 4"]


def test_an_axis_from_zero_lets_small_changes_look_small() -> None:
    points = [(0.0, 9.9), (1.0, 10.0)]
    ends = [polylines(line_chart("memory", [Line("", points)], from_zero=kind))[0] for kind in (False, True)]
    spans = [line[0][1] - line[-1][1] for line in ends]
    assert spans[0] == pytest.approx(HEIGHT - BOTTOM - TOP) and spans[1] == pytest.approx(spans[0] / 100, abs=0.1)
