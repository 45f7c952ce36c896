"""The steps of Ideogram 4: noise levels whose logits are those of a normal distribution, and follow the picture's size
(`_logit_normal_sigmas` of diffusers' Ideogram 4 pipeline)."""

from __future__ import annotations

import math
from typing import Any

import torch

DEVIATION = 1.5
BOUNDS = (1 / (1 + math.exp(7.5)), 1 / (1 + math.exp(-9.0)))
"""The smallest and the largest level."""


def logit_normal_levels(steps: int, mean: float) -> list[float]:
    """The levels of this many steps, from the largest noise on, before the last one, which is 0."""
    places = torch.linspace(0.0, 1.0, steps + 1, dtype=torch.float64)[1:].flip(0)
    levels = torch.special.expit(mean + DEVIATION * torch.special.ndtri(places))
    return levels.clamp(*BOUNDS).tolist()


class LogitNormalSteps:
    """A stock scheduler at these levels. Has the interface of a scheduler of diffusers.

    Args:
        stock: the scheduler, `FlowMatchEulerDiscreteScheduler` of diffusers.
    """

    def __init__(self, stock: Any):
        # It is asked for its levels with the picture's shift, though the stock one takes them as they are.
        self.stock, self.config = stock, type(stock.config)({**stock.config, "use_dynamic_shifting": True})

    @property
    def timesteps(self) -> torch.Tensor:
        return self.stock.timesteps

    def set_timesteps(self, num_inference_steps: int, mu: float) -> None:
        """Steps from the largest noise to none; `mu` is the logarithm of the shift."""
        self.stock.set_timesteps(sigmas=logit_normal_levels(num_inference_steps, mu))

    def step(self, velocity: torch.Tensor, timestep: torch.Tensor, latents: torch.Tensor, *, return_dict: bool) -> Any:
        """The latents of the next step."""
        return self.stock.step(velocity, timestep, latents, return_dict=return_dict)
