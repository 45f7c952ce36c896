"""The noise schedules of DDPM: how much of the picture is left at each of the integer steps.

Shapes: N steps of the schedule, B batch. Symbols: beta_n the variance that step n adds, abar_n the product of
1 - beta up to step n (Ho et al. 2020); x_n = sqrt(abar_n) x_0 + sqrt(1 - abar_n) noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

# A level that is a whole step, as k / 1000 is, may come a rounding below it.
ROUNDING = 1e-3
HIGHEST_COSINE_BETA = 0.999


def _linear(start: float, end: float, steps: int) -> torch.Tensor:
    """Ho et al. 2020, section 4."""
    return torch.linspace(start, end, steps, dtype=torch.float64)


def _scaled_linear(start: float, end: float, steps: int) -> torch.Tensor:
    """Linear in sqrt(beta): latent diffusion, Rombach et al. 2022 (its code)."""
    return _linear(math.sqrt(start), math.sqrt(end), steps).square()


def _cosine(start: float, end: float, steps: int) -> torch.Tensor:
    """abar = cos^2 of a quarter turn. Nichol and Dhariwal 2021, equation 17, with its cap; takes no start or end."""
    edges = torch.arange(steps + 1, dtype=torch.float64) / steps
    left = torch.cos((edges + 0.008) / 1.008 * math.pi / 2).square()
    return (1.0 - left[1:] / left[:-1]).clamp(max=HIGHEST_COSINE_BETA)


# By the names that diffusers gives them in a scheduler's configuration.
BETAS: Mapping[str, Callable[[float, float, int], torch.Tensor]] = {
    "linear": _linear,
    "scaled_linear": _scaled_linear,
    "squaredcos_cap_v2": _cosine,
}


def rescale_zero_terminal_snr(abar_N: torch.Tensor) -> torch.Tensor:
    """abar (N,) such that nothing of the picture is left at the last step and the first step is as it was.
    Lin et al. 2023, algorithm 1."""
    root_N = abar_N.sqrt()
    first, last = root_N[0], root_N[-1]
    return ((root_N - last) * (first / (first - last))).square()


@dataclass(frozen=True)
class NoiseSchedule:
    """A schedule of DDPM, computed in float64.

    Attributes:
        kind: a name in BETAS.
        beta_start, beta_end: the first and the last beta.
        steps: N.
        zero_terminal_snr: rescale, so that the last step is noise alone.
        snr_divisor: by what the ratio of the variances of picture and noise is divided at each step, before that; 3 for
            the smaller CogVideoX (`snr_shift_scale` of its schedulers in diffusers).

    Raises:
        ValueError: a value is out of its range.
    """

    kind: str = "scaled_linear"
    beta_start: float = 0.00085
    beta_end: float = 0.012
    steps: int = 1000
    zero_terminal_snr: bool = False
    snr_divisor: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in BETAS:
            raise ValueError(f"beta_schedule must be one of {', '.join(BETAS)}, and is {self.kind}")
        if not 0.0 < self.beta_start <= self.beta_end < 1.0:
            raise ValueError(
                f"betas must be 0 < beta_start <= beta_end < 1, and are {self.beta_start} and {self.beta_end}"
            )
        if self.snr_divisor <= 0.0:
            raise ValueError(f"snr_shift_scale must be above 0, and is {self.snr_divisor}")

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> NoiseSchedule:
        """The schedule that a `scheduler_config.json` of diffusers describes; what it leaves out as in diffusers.

        Raises:
            ValueError: it describes none that we know.
        """
        if config.get("trained_betas") is not None:
            raise ValueError("the scheduler's configuration has trained_betas, which are not supported")
        return cls(
            config.get("beta_schedule", "linear"),
            config.get("beta_start", 0.0001),
            config.get("beta_end", 0.02),
            config.get("num_train_timesteps", 1000),
            config.get("rescale_betas_zero_snr", False),
            config.get("snr_shift_scale", 1.0),
        )

    @cached_property
    def abar_N(self) -> torch.Tensor:
        """What is left of the picture's variance at each step."""
        betas_N = BETAS[self.kind](self.beta_start, self.beta_end, self.steps)
        abar_N = (1.0 - betas_N).cumprod(0)
        # abar / (1 - abar), divided, as an abar again.
        abar_N = abar_N / (self.snr_divisor + (1.0 - self.snr_divisor) * abar_N)
        return rescale_zero_terminal_snr(abar_N) if self.zero_terminal_snr else abar_N

    @cached_property
    def snr_N(self) -> torch.Tensor:
        """The ratio abar / (1 - abar) of the variances of picture and noise."""
        return self.abar_N / (1.0 - self.abar_N)

    def step(self, t_B: torch.Tensor) -> torch.Tensor:
        """The integer steps (B,), int64, of noise levels in [0, 1]: level t is step floor(t N), the last for t = 1.

        Levels that are uniform in (0, 1) so give each step as often as the others, and k / N gives step k.
        """
        return (t_B.double() * self.steps + ROUNDING).long().clamp(0, self.steps - 1)

    def snr(self, t_B: torch.Tensor) -> torch.Tensor:
        """abar / (1 - abar) (B,) at noise levels t_B in [0, 1], in float32."""
        return self.snr_N.to(t_B.device)[self.step(t_B)].float()

    def coefficients(self, t_B: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """sqrt(abar) and sqrt(1 - abar) at noise levels t_B, each (B, 1, ...), to multiply `like` (B, ...)."""
        abar_B = self.abar_N.to(t_B.device)[self.step(t_B)]
        return tuple(over_sample(root_B.sqrt().to(like.dtype), like) for root_B in (abar_B, 1.0 - abar_B))


def over_sample(values_B: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """(B,) -> (B, 1, ..., 1), to multiply a tensor of shape (B, ...)."""
    return values_B.view(-1, *[1] * (like.ndim - 1))
