"""Sums over all parameters, where each process has some of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import fsum

import torch

Total = Callable[[Sequence[Sequence[float]]], list[float]]
"""Rows of summands (those of this process) -> for each row the sum over all processes."""


def alone(rows: Sequence[Sequence[float]]) -> list[float]:
    """Where one process has all parameters. Exactly rounded, so that no order matters."""
    return [fsum(row) for row in rows]


def over(numbers_of_all: Callable[[Sequence[float]], Sequence[Sequence[float]]]) -> Total:
    """Where each process has some: the sums have the same bits however parameters are dealt to processes.

    Args:
        numbers_of_all: numbers of this process -> those of each process; all call it together.
    """

    def total(rows: Sequence[Sequence[float]]) -> list[float]:
        gathered = numbers_of_all([part for row in rows for part in _in_two_parts(row)])
        places = range(0, 2 * len(rows), 2)
        return [fsum(part for own in gathered for part in own[place : place + 2]) for place in places]

    return total


def _in_two_parts(row: Sequence[float]) -> tuple[float, float]:
    """A sum, and what it lacks by being rounded."""
    total = fsum(row)
    return total, fsum([*row, -total])


def read(values: Sequence[torch.Tensor]) -> list[float]:
    """Tensors without dimensions as numbers, for which the host waits once for each device."""
    numbers: dict[int, float] = {}
    for device in dict.fromkeys(value.device for value in values):
        places = [place for place, value in enumerate(values) if value.device == device]
        read_there = torch.stack([values[place].double() for place in places]).tolist()
        numbers |= dict(zip(places, read_there, strict=True))
    return [numbers[place] for place in range(len(values))]
