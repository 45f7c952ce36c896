"""What the losses of samples say, and that a change is told from chance."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import stdev
from types import SimpleNamespace

import pytest

from utils.run.evaluated import Evaluated, KeptEvaluations, change_of, extremes_of, groups_of
from utils.run.page_parts import groups
from utils.run.statistics import mean, standard_error, student_bound

LOSSES = {"a": (1.0, 3.0), "b": (2.0, 6.0), "c": (3.0, 3.0)}


@pytest.mark.parametrize(
    ("degrees", "bound"), [(1, 12.706205), (2, 4.302653), (5, 2.570582), (30, 2.042272), (1000, 1.962339)]
)
def test_the_bound_is_that_of_students_table(degrees: int, bound: float) -> None:
    assert student_bound(degrees) == pytest.approx(bound, abs=1e-6)


def test_standard_errors_are_of_means() -> None:
    values = [1.0, 2.0, 4.0, 7.0]
    assert standard_error(values) == pytest.approx(stdev(values) / math.sqrt(4))


def test_a_mean_is_the_same_in_any_order() -> None:
    values = [1e16, 1.0, -1e16, 3.0]
    assert mean(values) == mean(values[::-1]) == mean([values[i] for i in (1, 0, 3, 2)]) == 1.0


def test_numbers_of_an_evaluation() -> None:
    numbers = Evaluated((0.25, 0.75), LOSSES).numbers("held/loss")
    means = [2.0, 4.0, 3.0]
    assert numbers == {
        "held/loss_quantile_0.25": 2.0,
        "held/loss_quantile_0.75": 4.0,
        "held/loss": 3.0,
        "held/loss_standard_error": pytest.approx(stdev(means) / math.sqrt(3)),
    }
    assert "held/loss_standard_error" not in Evaluated((0.5,), {"a": (1.0,)}).numbers("held/loss")


def test_a_change_of_all_samples_is_seen_where_their_means_tell_nothing() -> None:
    before = {"a": 1.0, "b": 10.0, "c": 100.0}
    now = {name: loss - change for (name, loss), change in zip(before.items(), (0.10, 0.11, 0.12), strict=True)}
    change = change_of({**now, "new": 5.0}, {**before, "gone": 7.0}, 40)
    assert change.value == pytest.approx(-0.11)
    assert change.error == pytest.approx(4.302653 * 0.01 / math.sqrt(3), rel=1e-6)
    assert str(change) == "-0.11000 ± 0.02484 since step 40, better"
    assert change_of(before, now, 0).verdict == "worse"
    mixed = change_of({"a": 1.1, "b": 9.9}, {"a": 1.0, "b": 10.0}, 0)
    assert mixed.verdict == "neither better nor worse for sure" and change_of(now, {"a": 1.0}, 0) is None


def test_an_evaluation_is_compared_with_the_one_before_it(tmp_path: Path) -> None:
    kept = KeptEvaluations(tmp_path)
    for step in (0, 5, 10):
        kept.keep(step, "", {"held": {"samples": {"a": float(step)}, "groups": []}})
    kept.keep(7, "ema_", {"held": {"samples": {"a": 0.0}, "groups": []}})
    assert [kept.before(step, "")[0] for step in (5, 6, 11)] == [0, 5, 10] and kept.before(0, "") == (0, {})
    (tmp_path / "evaluations" / "step000010.json").write_text('{"held": {"samples"')
    assert kept.newest() == (5, {"held": {"samples": {"a": 5.0}, "groups": []}})
    kept.forget_after(5)
    assert sorted(path.name for path in (tmp_path / "evaluations").iterdir()) == ["step000000.json", "step000005.json"]
    assert math.isfinite(kept.newest()[1]["held"]["samples"]["a"])


def test_losses_are_told_by_size_and_directory_and_by_file() -> None:
    samples = [
        SimpleNamespace(
            id=str(number),
            bucket=f"{64 * (1 + number % 2)}x64x1",
            rules=SimpleNamespace(path="stars"),
            media=SimpleNamespace(locator=f"{number}.png"),
        )
        for number in range(8)
    ]
    means = {str(number): float(number) for number in range(8)}
    assert groups_of(samples, means) == [["size", "64x64x1", 4, 3.0], ["size", "128x64x1", 4, 4.0]]
    named = extremes_of(samples, means)
    assert named == [["7.png", 7.0], ["6.png", 6.0], ["5.png", 5.0], ["2.png", 2.0], ["1.png", 1.0], ["0.png", 0.0]]
    assert len(extremes_of(samples[:6], means)) == 6
    page = groups(30, {"held": {"groups": groups_of(samples, means), "extremes": named}})
    assert "<p>Step 30</p>" in page and "<td>128x64x1</td><td>4</td><td>4.00000</td>" in page and "7.png" in page
