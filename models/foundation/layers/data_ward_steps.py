"""The steps of MiniMax-H3's stock scheduler, which takes velocities towards the data, and whose timesteps are 1 at
clean samples."""

from __future__ import annotations

from typing import Any

import torch

TRAIN_STEPS = 1000


class DataWardSteps:
    """A scheduler with noise levels times 1000 as timesteps, which takes velocities towards the noise. Has the
    interface of a scheduler of diffusers.

    Args:
        stock: the scheduler, `MiniMaxH3Scheduler` of diffusers.
    """

    def __init__(self, stock: Any):
        self.stock, self.config = stock, type(stock.config)({**stock.config, "num_train_timesteps": TRAIN_STEPS})
        self.timesteps = torch.empty(0)

    def set_timesteps(self, num_inference_steps: int) -> None:
        """Steps from noise alone on, one less than are asked for: the stock one counts the end too."""
        self.stock.set_timesteps(num_inference_steps)
        self.timesteps = self.stock.sigmas[:-1] * TRAIN_STEPS

    def step(self, velocity: torch.Tensor, timestep: torch.Tensor, latents: torch.Tensor, *, return_dict: bool) -> Any:
        """The latents of the next step."""
        number = (self.timesteps == timestep).nonzero()[0].item()
        return self.stock.step(-velocity, self.stock.timesteps[number], latents, return_dict=return_dict)
