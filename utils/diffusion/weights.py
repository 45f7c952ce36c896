"""Weights of the loss at each noise level.

Shapes: B batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from utils.diffusion.objectives import Kind, Objective

# At the first step of usual schedules the ratio is above this, and with some infinite.
HIGHEST_SNR = 1000.0


def _one(sigma_B: torch.Tensor) -> torch.Tensor:
    return torch.ones_like(sigma_B)


def _sigma_sqrt(sigma_B: torch.Tensor) -> torch.Tensor:
    """1 / sigma^2."""
    return sigma_B**-2.0


def _cosmap(sigma_B: torch.Tensor) -> torch.Tensor:
    """2 / (pi (1 - 2 sigma + 2 sigma^2)): Esser et al. 2024, equation 22, as a weight on uniform draws."""
    return 2.0 / (math.pi * (1.0 - 2.0 * sigma_B + 2.0 * sigma_B.square()))


# Of flow matching, by the names of `compute_loss_weighting_for_sd3` in diffusers; sigma is the noise level t.
FLOW_WEIGHTINGS: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "none": _one,
    "sigma_sqrt": _sigma_sqrt,
    "cosmap": _cosmap,
}


def min_snr(snr_B: torch.Tensor, gamma: float, kind: Kind) -> torch.Tensor:
    """min(SNR, gamma) / SNR for noise, / (SNR + 1) for v. Hang et al. 2023 ("Efficient diffusion training via
    min-SNR weighting strategy")."""
    return _for_kind(snr_B.clamp(max=gamma), snr_B, kind)


def soft_min_snr(snr_B: torch.Tensor, gamma: float, kind: Kind) -> torch.Tensor:
    """As `min_snr`, with the smooth SNR gamma / (SNR + gamma) for the minimum. Crowson et al. 2024 ("Hourglass
    diffusion transformers")."""
    return _for_kind(snr_B * gamma / (snr_B + gamma), snr_B, kind)


def _for_kind(of_clean_B: torch.Tensor, snr_B: torch.Tensor, kind: Kind) -> torch.Tensor:
    """A weight on the error of x_0, as one on the error of what is predicted: |x_0 error|^2 is 1 / SNR of that of the
    noise, and 1 / (SNR + 1) of that of v."""
    return of_clean_B / (snr_B + 1.0 if kind == "v" else snr_B)


def debiased_estimation(snr_B: torch.Tensor, kind: Kind) -> torch.Tensor:
    """1 / sqrt(SNR) for noise (Yu et al. 2023, "Debias the training of diffusion models"), 1 / (SNR + 1) for v (kohya),
    the ratio at most 1000."""
    snr_B = snr_B.clamp(max=HIGHEST_SNR)
    return 1.0 / (snr_B + 1.0) if kind == "v" else snr_B.rsqrt()


def noise_pred_like(snr_B: torch.Tensor) -> torch.Tensor:
    """SNR / (SNR + 1), with which the loss of v is that of the noise; the ratio at most 1000 (kohya)."""
    snr_B = snr_B.clamp(max=HIGHEST_SNR)
    return snr_B / (snr_B + 1.0)


@dataclass(frozen=True)
class LossWeighting:
    """The weights that a user asks for; several multiply.

    Attributes:
        weighting_scheme: of flow matching, a name in FLOW_WEIGHTINGS.
        min_snr_gamma: see `min_snr`.
        soft_min_snr_gamma: see `soft_min_snr`.
        debiased_estimation_loss: see `debiased_estimation`.
        scale_v_pred_loss_like_noise_pred: see `noise_pred_like`.
        v_pred_like_loss: adds so many times the loss of the noise as if it were that of v.

    Raises:
        ValueError: a value is out of its range, or two contradict each other.
    """

    weighting_scheme: str = "none"
    min_snr_gamma: float | None = None
    soft_min_snr_gamma: float | None = None
    debiased_estimation_loss: bool = False
    scale_v_pred_loss_like_noise_pred: bool = False
    v_pred_like_loss: float = 0.0

    def __post_init__(self) -> None:
        if self.weighting_scheme not in FLOW_WEIGHTINGS:
            raise ValueError(
                f"weighting_scheme must be one of {', '.join(FLOW_WEIGHTINGS)}, and is {self.weighting_scheme}"
            )
        for name in ("min_snr_gamma", "soft_min_snr_gamma"):
            value = getattr(self, name)
            if value is not None and value <= 0.0:
                raise ValueError(f"{name} must be above 0, and is {value}; the paper has 5")
        if self.min_snr_gamma is not None and self.soft_min_snr_gamma is not None:
            raise ValueError("min_snr_gamma and soft_min_snr_gamma are two forms of one weight; leave one out")
        if self.v_pred_like_loss < 0.0:
            raise ValueError(f"v_pred_like_loss must not be below 0, and is {self.v_pred_like_loss}")

    def weight(self, objective: Objective, t_B: torch.Tensor) -> torch.Tensor:
        """The weight of each sample's loss (B,), float32, at noise levels t_B in (0, 1).

        `checks.refusals` has checked before that the objective can honour the options.
        """
        weight_B = FLOW_WEIGHTINGS[self.weighting_scheme](t_B.float())
        if objective.kind not in ("epsilon", "v"):
            return weight_B
        snr_B, kind = objective.snr(t_B), objective.kind
        if self.min_snr_gamma is not None:
            weight_B = weight_B * min_snr(snr_B, self.min_snr_gamma, kind)
        if self.soft_min_snr_gamma is not None:
            weight_B = weight_B * soft_min_snr(snr_B, self.soft_min_snr_gamma, kind)
        if self.scale_v_pred_loss_like_noise_pred:
            weight_B = weight_B * noise_pred_like(snr_B)
        if self.v_pred_like_loss:
            weight_B = weight_B * (1.0 + self.v_pred_like_loss / noise_pred_like(snr_B))
        if self.debiased_estimation_loss:
            weight_B = weight_B * debiased_estimation(snr_B, kind)
        return weight_B
