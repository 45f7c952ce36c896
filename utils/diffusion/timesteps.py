"""Which noise levels are trained: t in (0, 1), 0 is the clean picture and 1 is noise.

A draw is a quantile u, uniform in (0, 1), put through the quantile function of the method and then through the shift;
`min_t` and `max_t` limit what comes out. Training draws u from the seed; evaluation takes fixed quantiles. Both go
through `timestep`. Objectives say what a noise level is to them (`utils.diffusion.objectives`).
"""

from __future__ import annotations

import logging
import math
import runpy
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from utils.diffusion.distributions import Beta, CosMap, Distribution, LogitNormal, Mode, Uniform, log_snr_normal

LOWEST_QUANTILE = 1e-6
# A stretch of t that so few draws would meet has no numbers to tell its inside by.
LOWEST_SHARE = 1e-9


@dataclass(frozen=True)
class ResolutionShift:
    """log s, linear in the number of image tokens; the constants are those of a model's scheduler
    (`calculate_shift` of diffusers' Flux pipeline)."""

    base_tokens: int = 256
    max_tokens: int = 4096
    base_shift: float = 0.5
    max_shift: float = 1.15

    @property
    def fitted_to(self) -> tuple[int, int] | None:
        """The smallest and the largest number of tokens that the rule was made for; None if that is not known."""
        return self.base_tokens, self.max_tokens

    def mu(self, tokens: int, steps: int = 50) -> float:
        """What a stock scheduler of the model takes: log s. Of some models it depends on the number of steps too."""
        slope = (self.max_shift - self.base_shift) / (self.max_tokens - self.base_tokens)
        return self.base_shift + slope * (tokens - self.base_tokens)

    def factor(self, tokens: int) -> float:
        """s."""
        return math.exp(self.mu(tokens))


# The published constants, by the model that brought them.
RESOLUTION_SHIFTS: Mapping[str, ResolutionShift] = {
    "flux": ResolutionShift(256, 4096, 0.5, 1.15),
    "qwen": ResolutionShift(256, 8192, 0.5, 0.9),
    "ltx": ResolutionShift(1024, 4096, 0.95, 2.05),
    "krea2": ResolutionShift(256, 6400, 0.5, 1.15),
}


def shift_by_factor(t: float, factor: float) -> float:
    """s t / (1 + (s - 1) t): moves t towards noise for s > 1. Esser et al. 2024, equation 23. Its inverse is the shift
    by 1 / s."""
    return factor * t / (1.0 + (factor - 1.0) * t)


@dataclass(frozen=True)
class TimestepSampler:
    """How quantiles become noise levels.

    Attributes:
        method: a name in METHODS.
        sigmoid_scale: standard deviation of the normal number of `logit_normal` and `log_snr`.
        shift: a constant factor, or the rule by which the factor follows the number of tokens.
        logit_mean: mean of the normal number of `logit_normal` and `log_snr`.
        mode_scale: s of `mode`.
        beta_alpha, beta_beta: of `beta`.
        min_t, max_t: no level outside is drawn; inside, the density is as without them, but for its scale.

    Raises:
        ValueError: a value is out of its range.
    """

    method: str = "logit_normal"
    sigmoid_scale: float = 1.0
    shift: float | ResolutionShift | None = None
    logit_mean: float = 0.0
    mode_scale: float = Mode.scale
    beta_alpha: float = Beta.alpha
    beta_beta: float = Beta.beta
    min_t: float = 0.0
    max_t: float = 1.0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"timestep_sample_method must be one of {', '.join(METHODS)}, and is {self.method}")
        assert self.distribution
        check_shift(self.shift)
        check_range(self.min_t, self.max_t)
        sizes = (self.shift.base_tokens, self.shift.max_tokens) if isinstance(self.shift, ResolutionShift) else (0,)
        if min(self._share(tokens) for tokens in sizes) < LOWEST_SHARE:
            raise ValueError(f"{self.method} never draws a timestep from min_t {self.min_t} to max_t {self.max_t}")

    @property
    def distribution(self) -> Distribution:
        """The distribution of t before the shift."""
        return METHODS[self.method](self)

    def timestep(self, quantile: float, tokens: int) -> float:
        """The noise level at `quantile` of the distribution, for a sample of `tokens` image tokens."""
        low = self._unlimited(self.min_t, tokens)
        u = low + quantile * self._share(tokens)
        t = self.distribution.quantile(min(max(u, LOWEST_QUANTILE), 1.0 - LOWEST_QUANTILE))
        return min(max(shift_by_factor(t, self._factor(tokens)), self.min_t), self.max_t)

    def quantile(self, t: float, tokens: int) -> float:
        """The share of the draws that lies below t: the inverse of `timestep`."""
        inside = min(max(t, self.min_t), self.max_t)
        return (self._unlimited(inside, tokens) - self._unlimited(self.min_t, tokens)) / self._share(tokens)

    def density(self, t: float, tokens: int) -> float:
        """The density of the draws at t in (0, 1)."""
        if not self.min_t <= t <= self.max_t:
            return 0.0
        inverse = 1.0 / self._factor(tokens)
        slope = inverse / (1.0 + (inverse - 1.0) * t) ** 2
        return self.distribution.density(shift_by_factor(t, inverse)) * slope / self._share(tokens)

    def _factor(self, tokens: int) -> float:
        if isinstance(self.shift, ResolutionShift):
            return self.shift.factor(tokens)
        return 1.0 if self.shift is None else self.shift

    def _unlimited(self, t: float, tokens: int) -> float:
        """The share of the draws below t, were there no `min_t` and `max_t`."""
        if t in (0.0, 1.0):
            return t
        return self.distribution.cumulative(shift_by_factor(t, 1.0 / self._factor(tokens)))

    def _share(self, tokens: int) -> float:
        """The share of the draws between `min_t` and `max_t`, were there none."""
        return self._unlimited(self.max_t, tokens) - self._unlimited(self.min_t, tokens)


METHODS: Mapping[str, Callable[[TimestepSampler], Distribution]] = {
    "logit_normal": lambda sampler: LogitNormal(sampler.logit_mean, sampler.sigmoid_scale),
    "uniform": lambda sampler: Uniform(),
    "mode": lambda sampler: Mode(sampler.mode_scale),
    "cosmap": lambda sampler: CosMap(),
    "beta": lambda sampler: Beta(sampler.beta_alpha, sampler.beta_beta),
    "log_snr": lambda sampler: log_snr_normal(sampler.logit_mean, sampler.sigmoid_scale),
}


def check_shift(shift: float | ResolutionShift | None) -> None:
    """Raises ValueError if a constant shift is not positive: it would turn t around or make all of it 0."""
    if isinstance(shift, int | float) and not shift > 0.0:
        raise ValueError(f"shift must be above 0, and is {shift}; 1 shifts nothing, 3 towards noise")


def check_range(min_t: float, max_t: float) -> None:
    """Raises ValueError if no noise level is between `min_t` and `max_t`."""
    if not 0.0 <= min_t < max_t <= 1.0:
        raise ValueError(f"min_t and max_t must be 0 <= min_t < max_t <= 1, and are {min_t} and {max_t}")


if __name__ == "__main__":
    # What bitsandbytes says of a CPU when it is imported is of no use here.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # The command has the name of what it shows; what reads a config stands on a floor above.
    runpy.run_module("models.assembly.timestep_plot", run_name="__main__", alter_sys=True)
