"""Distributions of a number t in (0, 1), each by its quantile function, its distribution function and its density.

The quantile function is what training and evaluation use: t at u, for u uniform in (0, 1), rises with u.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist
from typing import Protocol

from utils.diffusion.incomplete_beta import log_beta, regularised_incomplete_beta

NORMAL = NormalDist()
# Halvings of (0, 1) that reach neighbouring floats, also close to 0.
HALVINGS = 80


class Distribution(Protocol):
    """A distribution of t in (0, 1)."""

    def quantile(self, u: float) -> float:
        """The t below which a fraction u of the draws lies, for u in (0, 1)."""

    def cumulative(self, t: float) -> float:
        """The fraction of the draws below t, for t in [0, 1]."""

    def density(self, t: float) -> float:
        """The derivative of `cumulative`, for t in (0, 1)."""


@dataclass(frozen=True)
class Uniform:
    """All t are equally likely."""

    def quantile(self, u: float) -> float:
        return u

    def cumulative(self, t: float) -> float:
        return t

    def density(self, t: float) -> float:
        return 1.0


@dataclass(frozen=True)
class LogitNormal:
    """logit(t) = log(t / (1 - t)) is normal. Esser et al. 2024 (Stable Diffusion 3), equation 19.

    Attributes:
        mean: of logit(t); above 0 towards t = 1.
        std: of logit(t).
    """

    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        _check_positive("sigmoid_scale", self.std)

    def quantile(self, u: float) -> float:
        logit = self.mean + self.std * NORMAL.inv_cdf(u)
        # Of the two forms of the sigmoid, the one that does not overflow.
        return 1.0 / (1.0 + math.exp(-logit)) if logit > 0.0 else math.exp(logit) / (1.0 + math.exp(logit))

    def cumulative(self, t: float) -> float:
        return NORMAL.cdf((_logit(t) - self.mean) / self.std)

    def density(self, t: float) -> float:
        return NORMAL.pdf((_logit(t) - self.mean) / self.std) / (self.std * t * (1.0 - t))


@dataclass(frozen=True)
class Mode:
    """t = 1 - v - s (cos^2(pi v / 2) - 1 + v), v uniform: heavy in the middle for s > 0, at the ends for s < 0.
    Esser et al. 2024, equation 20; falling in v there, so that the quantile function takes v = 1 - u.

    Attributes:
        scale: s, from -1 to 2 / (pi - 2) = 1.75, beyond which t does not fall everywhere.
    """

    scale: float = 1.29

    def __post_init__(self) -> None:
        highest = 2.0 / (math.pi - 2.0)
        if not -1.0 <= self.scale <= highest:
            raise ValueError(f"mode_scale must be from -1 to {highest:.4f} (2 / (pi - 2)), and is {self.scale}")

    def quantile(self, u: float) -> float:
        return u - self.scale * (math.sin(0.5 * math.pi * u) ** 2 - u)

    def cumulative(self, t: float) -> float:
        return _inverse(self.quantile, t)

    def density(self, t: float) -> float:
        return 1.0 / (1.0 + self.scale - self.scale * 0.5 * math.pi * math.sin(math.pi * self.cumulative(t)))


@dataclass(frozen=True)
class CosMap:
    """t / (1 - t) = tan(pi u / 2): the log-SNR of the cosine schedule. Esser et al. 2024, equation 21, with the density
    2 / (pi (1 - 2 t + 2 t^2)) of equation 22."""

    def quantile(self, u: float) -> float:
        return 1.0 - 1.0 / (math.tan(0.5 * math.pi * u) + 1.0)

    def cumulative(self, t: float) -> float:
        return 2.0 / math.pi * math.atan2(t, 1.0 - t)

    def density(self, t: float) -> float:
        return 2.0 / (math.pi * (1.0 - 2.0 * t + 2.0 * t * t))


@dataclass(frozen=True)
class Beta:
    """The beta distribution, with density t^(alpha - 1) (1 - t)^(beta - 1) / B(alpha, beta).

    Attributes:
        alpha: above 1 keeps away from t = 0.
        beta: above 1 keeps away from t = 1.
    """

    alpha: float = 2.0
    beta: float = 2.0

    def __post_init__(self) -> None:
        _check_positive("beta_alpha", self.alpha)
        _check_positive("beta_beta", self.beta)

    def quantile(self, u: float) -> float:
        return _inverse(self.cumulative, u)

    def cumulative(self, t: float) -> float:
        return regularised_incomplete_beta(t, self.alpha, self.beta)

    def density(self, t: float) -> float:
        powers = (self.alpha - 1.0) * math.log(t) + (self.beta - 1.0) * math.log1p(-t)
        return math.exp(powers - log_beta(self.alpha, self.beta))


def log_snr_normal(mean: float, std: float) -> LogitNormal:
    """The t of flow matching whose log-SNR 2 log((1 - t) / t) = -2 logit(t) is normal (Kingma and Gao 2023)."""
    return LogitNormal(-0.5 * mean, 0.5 * std)


def _logit(t: float) -> float:
    if t <= 0.0 or t >= 1.0:
        return math.copysign(math.inf, t - 0.5)
    return math.log(t) - math.log1p(-t)


def _inverse(rising: Callable[[float], float], value: float) -> float:
    """The x in [0, 1] at which `rising` has `value`, by halving."""
    low, high = 0.0, 1.0
    for _ in range(HALVINGS):
        middle = 0.5 * (low + high)
        if middle in (low, high):
            break
        low, high = (middle, high) if rising(middle) < value else (low, middle)
    return 0.5 * (low + high)


def _check_positive(name: str, value: float) -> None:
    if value <= 0.0:
        raise ValueError(f"{name} must be above 0, and is {value}")
