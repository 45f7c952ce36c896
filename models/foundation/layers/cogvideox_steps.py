"""CogVideoX's steps of DPM-Solver++ with the interface that schedulers of diffusers have."""

from __future__ import annotations

from typing import Any

import torch


class CogVideoXDPMSteps:
    """Remembers what the stock scheduler is to be told at each step of the one before it. Latents have their frames in
    the first dimension behind the batch in the stock pipeline, in whose order the noise of a step is drawn.

    Args:
        stock: `CogVideoXDPMScheduler` of diffusers.
    """

    def __init__(self, stock: Any):
        self.stock, self.config, self.init_noise_sigma = stock, stock.config, stock.init_noise_sigma
        self.timesteps = stock.timesteps
        self._before: tuple[torch.Tensor, torch.Tensor] | tuple[None, None] = (None, None)

    def set_timesteps(self, num_inference_steps: int) -> None:
        """Begins with the first of so many steps."""
        self.stock.set_timesteps(num_inference_steps)
        self.timesteps, self._before = self.stock.timesteps, (None, None)

    def step(
        self,
        prediction: torch.Tensor,
        timestep: torch.Tensor,
        latents: torch.Tensor,
        *,
        generator: torch.Generator | None = None,
        return_dict: bool,
    ) -> tuple[torch.Tensor]:
        """The latents (B, C, f, h, w) of the next step, for what the model gives."""
        clean_before, timestep_before = self._before
        latents, clean = self.stock.step(
            prediction.transpose(1, 2),
            clean_before,
            timestep,
            timestep_before,
            latents.transpose(1, 2),
            generator=generator,
            return_dict=return_dict,
        )[:2]
        self._before = clean, timestep
        return (latents.transpose(1, 2),)
