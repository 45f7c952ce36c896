"""Stratified quantiles: one in each part, each by itself uniform, the same for the same name."""

from __future__ import annotations

import pytest

from utils.diffusion.strata import in_batch, in_epoch, permuted


@pytest.mark.parametrize("count", [1, 2, 3, 5, 16, 17, 100, 1000])
def test_every_part_has_one(count: int) -> None:
    epoch = [in_epoch(3, 1, position, count) for position in range(count)]
    batch = [in_batch(3, 1, 7, position, count) for position in range(count)]
    for quantiles in (epoch, batch):
        assert sorted(int(u * count) for u in quantiles) == list(range(count))
        assert all(0.0 <= u < 1.0 for u in quantiles)


@pytest.mark.parametrize("count", [2, 3, 6, 10])
def test_each_draw_by_itself_is_uniform(count: int) -> None:
    """How often a position has each part, over many seeds, within 5 standard deviations."""
    seeds = 2000
    for position in (0, count - 1):
        drawn = [permuted(position, count, seed, "test") for seed in range(seeds)]
        expected, deviation = seeds / count, (seeds * (1 - 1 / count) / count) ** 0.5
        assert all(abs(drawn.count(part) - expected) < 5 * deviation for part in range(count))


def test_depends_on_seed_epoch_and_batch() -> None:
    def all_of(seed: int, epoch: int, batch: int) -> list[float]:
        return [in_batch(seed, epoch, batch, position, 8) for position in range(8)]

    assert all_of(0, 0, 0) == all_of(0, 0, 0)
    assert len({tuple(all_of(*name)) for name in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1))}) == 4


def test_a_large_epoch_is_not_laid_out() -> None:
    """Ten billion samples, of which one is asked for."""
    assert 0.0 <= in_epoch(0, 0, 123_456_789, 10**10) < 1.0
