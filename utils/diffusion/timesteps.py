"""Which noise levels are trained: t in (0, 1), 0 is the clean picture and 1 is noise.

A draw is a quantile u, uniform in (0, 1), put through the inverse distribution function of the method and then through
the shift. Training draws u from the seed; evaluation takes fixed quantiles. Both go through `timestep`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist

NORMAL = NormalDist()
LOWEST_QUANTILE = 1e-6


def _logit_normal(u: float, scale: float) -> float:
    """t = sigmoid(scale * z), z standard normal. Esser et al. 2024 (Stable Diffusion 3), section 3.1."""
    return 1.0 / (1.0 + math.exp(-scale * NORMAL.inv_cdf(u)))


def _uniform(u: float, scale: float) -> float:
    return u


INVERSE_DISTRIBUTIONS: dict[str, Callable[[float, float], float]] = {
    "logit_normal": _logit_normal,
    "uniform": _uniform,
}


def shift_by_factor(t: float, factor: float) -> float:
    """s t / (1 + (s - 1) t): moves t towards noise for s > 1. Esser et al. 2024, equation 23."""
    return factor * t / (1.0 + (factor - 1.0) * t)


@dataclass(frozen=True)
class ResolutionShift:
    """log s, linear in the number of image tokens; the constants are those of a model's scheduler
    (`calculate_shift` of diffusers' Flux pipeline)."""

    base_tokens: int = 256
    max_tokens: int = 4096
    base_shift: float = 0.5
    max_shift: float = 1.15

    def factor(self, tokens: int) -> float:
        slope = (self.max_shift - self.base_shift) / (self.max_tokens - self.base_tokens)
        return math.exp(self.base_shift + slope * (tokens - self.base_tokens))


@dataclass(frozen=True)
class TimestepSampler:
    """How quantiles become noise levels.

    Attributes:
        method: a name in INVERSE_DISTRIBUTIONS.
        sigmoid_scale: width of the logit-normal distribution.
        shift: a constant factor, or the rule by which the factor follows the number of tokens.
    """

    method: str = "logit_normal"
    sigmoid_scale: float = 1.0
    shift: float | ResolutionShift | None = None

    def timestep(self, quantile: float, tokens: int) -> float:
        """The noise level at `quantile` of the distribution, for a sample of `tokens` image tokens."""
        u = min(max(quantile, LOWEST_QUANTILE), 1.0 - LOWEST_QUANTILE)
        t = INVERSE_DISTRIBUTIONS[self.method](u, self.sigmoid_scale)
        if self.shift is None:
            return t
        factor = self.shift.factor(tokens) if isinstance(self.shift, ResolutionShift) else self.shift
        return shift_by_factor(t, factor)
