"""What the denoiser is asked to predict.

Shapes: B batch, then the latent's own dimensions (C H W for pictures, C F H W for clips), written `...`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch


class Objective(Protocol):
    """What training and sampling need to know of it."""

    def noised(self, clean: torch.Tensor, noise: torch.Tensor, t_B: torch.Tensor) -> torch.Tensor:
        """x_t, in the shape of `clean` (B, ...), at noise levels t_B in [0, 1]."""

    def target(self, clean: torch.Tensor, noise: torch.Tensor, t_B: torch.Tensor) -> torch.Tensor:
        """What the denoiser should output, in the shape of `clean`."""

    def for_scheduler(self, prediction: torch.Tensor) -> torch.Tensor:
        """The denoiser's output as the stock scheduler of diffusers takes it."""


@dataclass(frozen=True)
class FlowMatching:
    """Rectified flow: x_t = (1 - t) x_0 + t n, and the velocity n - x_0 (Liu et al. 2022; Lipman et al. 2022).

    Attributes:
        predicts_data_minus_noise: the denoiser's output is x_0 - n (HiDream, Lumina 2, Z-Image), not n - x_0.
    """

    predicts_data_minus_noise: bool = False

    def noised(self, clean: torch.Tensor, noise: torch.Tensor, t_B: torch.Tensor) -> torch.Tensor:
        """x_t, in the shape of `clean` (B, ...)."""
        t = _over_sample(t_B, clean)
        return (1.0 - t) * clean + t * noise

    def target(self, clean: torch.Tensor, noise: torch.Tensor, t_B: torch.Tensor) -> torch.Tensor:
        """What the denoiser should output, in the shape of `clean` (B, ...)."""
        velocity = noise - clean
        return -velocity if self.predicts_data_minus_noise else velocity

    def for_scheduler(self, prediction: torch.Tensor) -> torch.Tensor:
        """The velocity n - x_0 = dx/dt."""
        return -prediction if self.predicts_data_minus_noise else prediction


def _over_sample(values_B: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """(B,) -> (B, 1, ..., 1), to multiply a tensor of shape (B, ...)."""
    return values_B.view(-1, *[1] * (like.ndim - 1))
