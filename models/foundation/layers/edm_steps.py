"""Stock schedulers with noise levels t in [0, 1] as timesteps.

The samples of those of Karras et al. 2022, "Elucidating the design space", are x_s = x_0 + s n, with t = s / (1 + s). A
model of rectified flow sees x_t = (1 - t) x_0 + t n, which is x_s / (1 + s), and predicts n - x_0; the paper's own sees
c_in x_s, and predicts F.
"""

from __future__ import annotations

from typing import Any

import torch

SIGMA_MIN, SIGMA_MAX = 0.002, 80.0


class EdmSteps:
    """For a model of rectified flow. Has the interface of a scheduler of diffusers; its timesteps are the model's, t
    times 1000.

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


class LevelSteps:
    """A scheduler whose sigmas are noise levels t: its timesteps are these times 1000, of which those of the stock one
    may have lost the fractions. Has the interface of a scheduler of diffusers.

    Args:
        stock: the scheduler.
    """

    def __init__(self, stock: Any):
        self.stock, self.config = stock, stock.config
        self.timesteps = torch.empty(0)

    def set_timesteps(self, num_inference_steps: int) -> None:
        """Steps from the largest noise to the smallest."""
        self.stock.set_timesteps(num_inference_steps)
        self.timesteps = self.levels(self.stock.sigmas[:-1]) * self.config.num_train_timesteps

    def levels(self, sigmas: torch.Tensor) -> torch.Tensor:
        """t for the scheduler's sigmas."""
        return sigmas

    def step(
        self, prediction: torch.Tensor, timestep: torch.Tensor, latents: torch.Tensor, *, return_dict: bool
    ) -> Any:
        """The latents of the next step, for what the model gives."""
        return self.stock.step(prediction, self._told(timestep), latents, return_dict=return_dict)

    def _told(self, timestep: torch.Tensor) -> torch.Tensor:
        """The stock scheduler's own timestep."""
        return self.stock.timesteps[(self.timesteps == timestep).nonzero()[0].item()]


class PreconditionedSteps(LevelSteps):
    """For the paper's own model.

    Args:
        stock: the scheduler, `EDMEulerScheduler` of diffusers.
    """

    def __init__(self, stock: Any):
        super().__init__(stock)
        self.init_noise_sigma = stock.config.sigma_max

    def levels(self, sigmas: torch.Tensor) -> torch.Tensor:
        """s / (1 + s)."""
        return sigmas / (1 + sigmas)

    def scale_model_input(self, latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """c_in x_s."""
        return self.stock.scale_model_input(latents, self._told(timestep))
