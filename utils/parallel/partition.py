"""Divides layers among stages."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn


def repeated_blocks(layers: Sequence[nn.Module]) -> list[int]:
    """The positions of the repeated blocks among layers."""
    return [position for position, layer in enumerate(layers) if getattr(layer, "recomputable", False)]


def stage_bounds(
    method: str,
    layer_sizes: Sequence[int],
    stages: int,
    split: Sequence[int] | None = None,
    weights: Sequence[float] | None = None,
) -> list[tuple[int, int]]:
    """The half-open range of layers for every stage.

    Args:
        method: "parameters" balances the number of parameters, frozen ones included, since under LoRA they take the
            memory and the time; "uniform" balances the number of layers; "manual" begins stages 1, 2, ... at the
            layers named in `split`.
        layer_sizes: parameters per layer, in order.
        weights: what each stage is to take, relative to the others; default: all alike.

    Raises:
        ValueError: there are fewer layers than stages, or `split` does not fit the layers.
    """
    count = len(layer_sizes)
    assert weights is None or len(weights) == stages, "the settings' rules see to it"
    if stages > count:
        raise ValueError(
            f"pipeline_stages = {stages}, but the model has only {count} layers; use at most {count} stages"
        )
    if method == "manual":
        starts = _manual_starts(count, stages, split or ())
    else:
        sizes = [1] * count if method == "uniform" else list(layer_sizes)
        starts = _balanced_starts(sizes, weights or [1.0] * stages)
    return list(zip(starts, [*starts[1:], count], strict=True))


def _manual_starts(count: int, stages: int, split: Sequence[int]) -> list[int]:
    starts = [0, *split]
    if len(starts) != stages:
        raise ValueError(f"partition_split names {len(split)} layers; {stages} stages need {stages - 1}")
    if any(late <= early for early, late in zip(starts, [*starts[1:], count], strict=True)):
        raise ValueError(
            f"partition_split = {list(split)} must increase strictly within 1 and {count - 1}, "
            f"since the model has {count} layers"
        )
    return starts


def _balanced_starts(sizes: Sequence[int], weights: Sequence[float]) -> list[int]:
    """The starts of contiguous, non-empty parts, one for each weight, of which the largest relative to its weight is as
    small as possible (dynamic programming over the last part's start); among equals, those with the earliest cuts."""
    sums = [0]
    for size in sizes:
        sums.append(sums[-1] + size)
    count, stages = len(sizes), len(weights)
    largest = [[0.0] * (count + 1) for _ in range(stages + 1)]
    start = [[0] * (count + 1) for _ in range(stages + 1)]
    for end in range(1, count + 1):
        largest[1][end] = sums[end] / weights[0]
    for parts in range(2, stages + 1):
        weight = weights[parts - 1]
        for end in range(parts, count + 1):
            options = [
                (max(largest[parts - 1][cut], (sums[end] - sums[cut]) / weight), cut) for cut in range(parts - 1, end)
            ]
            largest[parts][end], start[parts][end] = min(options)
    starts, end = [], count
    for parts in range(stages, 0, -1):
        end = start[parts][end]
        starts.append(end)
    return starts[::-1]
