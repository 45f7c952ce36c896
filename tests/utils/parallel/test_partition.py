"""Layers shared among stages."""

from __future__ import annotations

from itertools import combinations

import pytest

from utils.parallel.partition import layers_text, of_stage, stage_bounds, within

SIZES = [3, 40, 7, 7, 1, 25, 9]


@pytest.mark.parametrize("stages", [1, 2, 3, 5, 7])
def test_parameters_are_balanced_as_well_as_can_be(stages: int) -> None:
    bounds = stage_bounds("parameters", SIZES, stages)
    assert bounds[0][0] == 0 and bounds[-1][1] == len(SIZES)
    assert all(stop == start for (_, stop), (start, _) in zip(bounds, bounds[1:], strict=False))
    cuts = ([0, *cut, len(SIZES)] for cut in combinations(range(1, len(SIZES)), stages - 1))
    best = min(max(sum(SIZES[a:b]) for a, b in zip(cut, cut[1:], strict=False)) for cut in cuts)
    assert max(sum(SIZES[start:stop]) for start, stop in bounds) == best


@pytest.mark.parametrize("weights", [[2.0, 1.0], [1.0, 3.0, 1.5], [0.2, 1.0, 1.0, 0.1]])
def test_stages_take_their_share(weights: list[float]) -> None:
    stages = len(weights)
    bounds = stage_bounds("parameters", SIZES, stages, weights=weights)
    assert [start for start, _ in bounds[1:]] == [stop for _, stop in bounds[:-1]] and bounds[-1][1] == len(SIZES)

    def largest(cut: list[int]) -> float:
        parts = zip(cut, cut[1:], strict=False)
        return max(sum(SIZES[a:b]) / weight for (a, b), weight in zip(parts, weights, strict=True))

    best = min(largest([0, *cut, len(SIZES)]) for cut in combinations(range(1, len(SIZES)), stages - 1))
    assert largest([0, *(stop for _, stop in bounds)]) == best


def test_a_card_of_twice_the_size_takes_two_thirds() -> None:
    assert stage_bounds("uniform", [1] * 57, 2, weights=[2, 1]) == [(0, 38), (38, 57)]
    assert stage_bounds("uniform", [1] * 57, 2, weights=[1, 2]) == [(0, 19), (19, 57)]


def test_uniform_counts_layers() -> None:
    assert sorted(stop - start for start, stop in stage_bounds("uniform", SIZES, 3)) == [2, 2, 3]


def test_manual_begins_stages_where_told() -> None:
    assert stage_bounds("manual", SIZES, 3, [1, 5]) == [(0, 1), (1, 5), (5, 7)]


@pytest.mark.parametrize(
    ("stages", "split", "told"),
    [
        (3, [2], "3 stages need 2"),
        (2, [7], "within 1 and 6"),
        (3, [4, 4], "increase"),
        (2, [0], "within 1"),
    ],
)
def test_a_split_that_does_not_fit_is_refused(stages: int, split: list[int], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        stage_bounds("manual", SIZES, stages, split)


def test_more_stages_than_layers_are_refused() -> None:
    with pytest.raises(ValueError, match="at most 7 stages"):
        stage_bounds("parameters", SIZES, 8)


def test_a_stage_has_every_so_many_pieces() -> None:
    bounds = [(0, 2), (2, 3), (3, 5), (5, 8)]
    own = of_stage(bounds, 1, 2)
    assert own == ((2, 3), (5, 8)) and within(own, range(8)) == [2, 5, 6, 7]
    assert layers_text(own) == "layers 2 and 5 to 7"
    assert layers_text(own[:1]) == "layer 2"
    assert layers_text(own[1:]) == "layers 5 to 7"
