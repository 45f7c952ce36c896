"""Divides layers among stages."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import TypeVar

from torch import nn

T = TypeVar("T")
Range = tuple[int, int]
"""The first layer of a piece, and the one after its last."""
Cost = Callable[[int, int, int], float]
"""(stage, first layer, the layer after its last) -> what the stage, or the piece, costs with them."""
Bounds = list[Range]
"""Those of all pieces of a model. A stage has one piece, or several where others have their turns between them."""


def of_stage(of_pieces: Sequence[T], stage: int, stages: int) -> tuple[T, ...]:
    """Of what all pieces have, that of the pieces of one of so many stages."""
    return tuple(of_pieces[stage::stages])


def layers_text(pieces: Sequence[Range]) -> str:
    """The layers of some pieces: "layers 0 to 3 and 8", "layer 5"."""
    of_pieces = [str(start) if stop - start == 1 else f"{start} to {stop - 1}" for start, stop in pieces]
    return f"layer{'' if of_pieces[0].isdigit() and len(pieces) == 1 else 's'} {' and '.join(of_pieces)}"


def within(ranges: Sequence[Range], of_layers: Sequence[T]) -> list[T]:
    """Of what all layers have, that of the layers in these ranges."""
    return [one for start, stop in ranges for one in of_layers[start:stop]]


def repeated_blocks(layers: Sequence[nn.Module]) -> list[int]:
    """The positions of the repeated blocks among layers."""
    return [position for position, layer in enumerate(layers) if getattr(layer, "recomputable", False)]


def stage_bounds(
    method: str,
    layer_sizes: Sequence[int],
    stages: int,
    split: Sequence[int] | None = None,
    weights: Sequence[float] | None = None,
    too_few: Cost | None = None,
) -> Bounds | None:
    """The half-open range of layers for every stage, or for every piece of one; None if there is no such cut.

    Args:
        method: "parameters" balances the number of parameters, frozen ones included, since under LoRA they take the
            memory and the time; "uniform" balances the number of layers; "manual" begins stages 1, 2, ... at the
            layers named in `split`.
        layer_sizes: parameters per layer, in order.
        weights: what each stage is to take, relative to the others; default: all alike.
        too_few: is infinite where a stage must not have these layers, else 0; not for "manual".

    Raises:
        ValueError: there are fewer layers than stages, or `split` does not fit the layers.
    """
    count = len(layer_sizes)
    if stages > count:
        raise ValueError(
            f"pipeline_stages = {stages}, but the model has only {count} layers; use at most {count} stages"
        )
    if method == "manual":
        starts = _manual_starts(count, stages, split or ())
        return list(zip(starts, [*starts[1:], count], strict=True))
    sizes = [1] * count if method == "uniform" else layer_sizes
    sums = [0, *accumulate(sizes)]
    return balanced_bounds(
        lambda stage, start, stop: (too_few and too_few(stage, start, stop)) or sums[stop] - sums[start],
        count,
        stages,
        weights,
    )


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


def balanced_bounds(cost: Cost, count: int, stages: int, weights: Sequence[float] | None = None) -> Bounds | None:
    """The cut of which the costliest stage, relative to its weight, costs as little as possible; among equals, the one
    with the earliest cuts. None if every cut has a stage that costs infinitely much.

    Args:
        count: of layers; at least as many as stages.
    """
    weights = weights or [1.0] * stages
    assert len(weights) == stages <= count, "the settings' rules see to it"
    # Dynamic programming over the start of the last part.
    largest = [[0.0] * (count + 1) for _ in range(stages)]
    begin = [[0] * (count + 1) for _ in range(stages)]
    for stage, weight in enumerate(weights):
        for stop in range(stage + 1, count - (stages - 1 - stage) + 1):
            starts = range(stage, stop) if stage else (0,)
            options = [
                (max(largest[stage - 1][start] if stage else 0.0, cost(stage, start, stop) / weight), start)
                for start in starts
            ]
            largest[stage][stop], begin[stage][stop] = min(options)
    if math.isinf(largest[-1][count]):
        return None
    bounds, stop = [], count
    for stage in reversed(range(stages)):
        bounds.append((begin[stage][stop], stop))
        stop = begin[stage][stop]
    return bounds[::-1]


def lacking(layers: Sequence[nn.Module], numbers: Sequence[int]) -> Cost:
    """(stage, first layer, the layer after its last) -> infinity if the stage would have fewer blocks than its number,
    else 0."""
    positions = repeated_blocks(layers)

    def cost(stage: int, start: int, stop: int) -> float:
        return math.inf if bisect_left(positions, stop) - bisect_left(positions, start) < numbers[stage] else 0.0

    return cost
