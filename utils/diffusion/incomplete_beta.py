"""The regularised incomplete beta function, which neither the standard library nor torch has."""

from __future__ import annotations

import math

TERMS = 10_000
# Below the spacing of floats near 1; a term this close to 1 no longer changes the product.
PRECISION = 1e-16
SMALLEST = 1e-300


def log_beta(a: float, b: float) -> float:
    """log B(a, b)."""
    return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)


def regularised_incomplete_beta(x: float, a: float, b: float) -> float:
    """I_x(a, b), the distribution function of the beta distribution, for x in [0, 1] and positive a, b.

    The continued fraction of DLMF 8.17.22. It converges fast below (a + 1) / (a + b + 2); above, the symmetry
    I_x(a, b) = 1 - I_{1-x}(b, a) is used.
    """
    if x <= 0.0 or x >= 1.0:
        return 0.0 if x <= 0.0 else 1.0
    if x > (a + 1.0) / (a + b + 2.0):
        return 1.0 - regularised_incomplete_beta(1.0 - x, b, a)
    front = math.exp(a * math.log(x) + b * math.log1p(-x) - log_beta(a, b)) / a
    return front * _fraction(x, a, b)


def _fraction(x: float, a: float, b: float) -> float:
    """1 / (1 + d_1 / (1 + d_2 / (1 + ...))), evaluated from the front by Lentz's method (Thompson and Barnett 1986)."""
    value, c, d = 1.0, 1.0, 0.0
    for term in range(TERMS):
        numerator = _numerator(term, x, a, b)
        d = 1.0 / _away_from_zero(1.0 + numerator * d)
        c = _away_from_zero(1.0 + numerator / c)
        value *= c * d
        if abs(c * d - 1.0) < PRECISION:
            break
    return 1.0 / value


def _numerator(term: int, x: float, a: float, b: float) -> float:
    """d_(term + 1); DLMF 8.17.23 gives the even and the odd ones."""
    m = (term + 1) // 2
    if term % 2 == 1:
        return m * (b - m) * x / ((a + 2 * m - 1.0) * (a + 2 * m))
    return -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1.0))


def _away_from_zero(value: float) -> float:
    return value if abs(value) > SMALLEST else SMALLEST
