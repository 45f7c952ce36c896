"""Muon for matrices, AdamW for the rest (Jordan et al. 2024; Liu et al. 2025, "Muon is Scalable for LLM Training")."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch.optim._muon import muon
from torch.optim.adamw import adamw

from optimizers.adamw import with_master
from optimizers.by_parameter import ByParameter, kept_bytes
from optimizers.kinds import OptimizerKind
from utils.settings.schema import OptimizerSettings
from utils.settings.values import Betas, Count, Positive, Share

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the Newton-Schulz iteration (Jordan et al.)."""


class MuonSettings(OptimizerSettings):
    """`type = "muon"`: steps of matrices go equally far in all their directions; half of Adam's state. Vectors have
    AdamW. With a float32 master of each parameter that is kept in 16 bits."""

    type: Literal["muon"]
    """Algorithm; upper and lower case are alike."""
    momentum: Share = 0.95
    """Decay rate of the running mean of a matrix's gradient."""
    nesterov: bool = True
    """Nesterov's momentum."""
    ns_steps: Count = 5
    """Iterations that make the update of a matrix orthogonal."""
    adjust_lr_fn: Literal["match_rms_adamw", "original"] = "match_rms_adamw"
    """How the learning rate of a matrix follows from `lr`: so that updates are as large as AdamW's, or Jordan's."""
    betas: Betas = (0.9, 0.95)
    """Of AdamW, which steps vectors."""
    eps: Positive = 1e-8
    """Of AdamW, which steps vectors."""


class Muon(ByParameter):
    """As `torch.optim.Muon` for matrices, and for kernels of convolutions as matrices with a row for each output; as
    `torch.optim.AdamW` for vectors and scalars."""

    def __init__(self, params: Any, lr: float, weight_decay: float, **keys: Any) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, **keys})

    def move(self, weight: torch.Tensor, gradient: torch.Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        if weight.ndim < 2:
            self._adamw(weight, gradient, state, group)
            return
        matrix, gradient = weight.reshape(len(weight), -1), gradient.reshape(len(weight), -1)
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(matrix)
        muon(
            [matrix],
            [gradient],
            [state["momentum_buffer"]],
            ns_coefficients=COEFFICIENTS,
            eps=1e-7,
            has_complex=False,
            **{key: group[key] for key in ("lr", "weight_decay", "momentum", "nesterov", "ns_steps", "adjust_lr_fn")},
        )
        if matrix.data_ptr() != weight.data_ptr():
            # Its elements lie in another order.
            weight.copy_(matrix.view(weight.shape))

    def _adamw(
        self, weight: torch.Tensor, gradient: torch.Tensor, state: dict[str, Any], group: dict[str, Any]
    ) -> None:
        if "step" not in state:
            state |= {
                "step": torch.zeros(()),
                "exp_avg": torch.zeros_like(weight),
                "exp_avg_sq": torch.zeros_like(weight),
            }
        adamw(
            [weight],
            [gradient],
            [state["exp_avg"]],
            [state["exp_avg_sq"]],
            [],
            [state["step"]],
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def _state_bytes(settings: MuonSettings, parameter: torch.Tensor) -> int:
    return kept_bytes(1 if parameter.ndim > 1 else 2, parameter)


KINDS = (
    OptimizerKind(
        MuonSettings,
        Muon,
        _state_bytes,
        not_on={},
        retyped=with_master,
        float32_gradients=True,
        library="ours, with the update of torch",
    ),
)
