"""How sure a mean is."""

from __future__ import annotations

from collections.abc import Sequence
from math import fsum, sqrt

from utils.diffusion.incomplete_beta import regularised_incomplete_beta

CONFIDENCE = 0.95


def mean(values: Sequence[float]) -> float:
    """Rounded once, so that it is the same in any order."""
    return fsum(values) / len(values)


def standard_error(values: Sequence[float]) -> float:
    """Of the mean of independent values, of which there are at least two."""
    middle = mean(values)
    return sqrt(fsum((value - middle) ** 2 for value in values) / (len(values) - 1) / len(values))


def student_bound(degrees: int, confidence: float = CONFIDENCE) -> float:
    """t with P(|T| <= t) = confidence, for Student's T with so many degrees of freedom (1908). 12.71 for 1, 1.96 for
    many."""
    low, high = 0.0, 1.0
    while _inside(high, degrees) < confidence:
        low, high = high, 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _inside(middle, degrees) < confidence else (low, middle)
    return high


def _inside(t: float, degrees: int) -> float:
    """P(|T| <= t); DLMF 8.17."""
    return 1 - regularised_incomplete_beta(degrees / (degrees + t * t), degrees / 2, 0.5)
