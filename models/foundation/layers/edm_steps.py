"""A stock scheduler of Karras et al. 2022, "Elucidating the design space", for a model of rectified flow.

That scheduler's samples are x_s = x_0 + s n; the model sees x_t = (1 - t) x_0 + t n, which is x_s / (1 + s) with
t = s / (1 + s), and predicts n - x_0.
"""

from __future__ import annotations

from typing import Any

import torch

SIGMA_MIN, SIGMA_MAX = 0.002, 80.0


class EdmSteps:
    """Has the interface of a scheduler of diffusers; its timesteps are those of the model, t times 1000.

    Args:
        stock: the scheduler, `FlowMatchEulerDiscreteScheduler` of diffusers. It is changed, to the sigmas of the stock
            pipeline of Cosmos-Predict2.
    """

    init_noise_sigma = SIGMA_MAX

    def __init__(self, stock: Any):
        stock.register_to_config(sigma_min=SIGMA_MIN, sigma_max=SIGMA_MAX)
        self.stock, self.config = stock, stock.config
        self.timesteps = torch.empty(0)

    def set_timesteps(self, num_inference_steps: int) -> None:
        """Steps from `SIGMA_MAX` down to `SIGMA_MIN`, at which the last one stays."""
        self.stock.set_timesteps(sigmas=torch.linspace(0, 1, num_inference_steps, dtype=torch.float64).numpy())
        self.stock.sigmas[-1] = self.stock.sigmas[-2]
        sigmas = self.stock.sigmas[:-1]
        self.timesteps = sigmas / (1 + sigmas) * self.config.num_train_timesteps

    def scale_model_input(self, latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """x_t of x_s."""
        return latents * (1 - timestep / self.config.num_train_timesteps)

    def step(self, velocity: torch.Tensor, timestep: torch.Tensor, latents: torch.Tensor, *, return_dict: bool) -> Any:
        """x_s of the next step, as the stock scheduler gives it for the prediction n - x_0."""
        number = (self.timesteps == timestep).nonzero()[0].item()
        sigma = self.stock.sigmas[number]
        t = sigma / (1 + sigma)
        clean = (1 - t) * latents - t * velocity
        noise = (latents - clean) / sigma
        return self.stock.step(noise, self.stock.timesteps[number], latents, return_dict=return_dict)
