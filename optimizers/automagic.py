"""Automagic, of ai-toolkit: each weight has a learning rate, which grows while its update keeps its sign. Otherwise it
is Adafactor without momentum (Shazeer and Stern 2018)."""

from __future__ import annotations

from typing import Any, Literal

import torch

from optimizers.adafactor import rows_and_columns
from optimizers.adamw import with_master
from optimizers.by_parameter import ByParameter
from optimizers.kinds import OptimizerKind
from optimizers.rounding import is_short
from utils.settings.schema import OptimizerSettings
from utils.settings.values import NotNegative, Positive, Share


class AutomagicSettings(OptimizerSettings):
    """`type = "automagic"`: a learning rate for each weight, which grows while its update keeps its sign and shrinks
    when it turns. `lr` is where all begin; a schedule is a factor on them."""

    type: Literal["automagic"]
    """Algorithm; upper and lower case are alike."""
    lr: Positive = 1e-6
    """Learning rate with which every weight begins."""
    min_lr: Positive = 1e-7
    """Least learning rate of a weight."""
    max_lr: Positive = 1e-3
    """Largest learning rate of a weight."""
    lr_bump: Positive = 1e-6
    """What is added to a learning rate, or taken from it, in a step."""
    eps: Positive = 1e-30
    """Added to squares of gradients."""
    clip_threshold: Positive = 1.0
    """Root mean square to which an update is limited."""
    beta2: Share = 0.999
    """Decay rate of the running means of squares of rows and columns."""
    weight_decay: NotNegative = 0.0
    """Decay of the weights per step, times the learning rate of each."""


class Automagic(ByParameter):
    """State is in float32, but for the signs; a learning rate in 16 bits would not take the bumps."""

    def __init__(self, params: Any, lr: float, **keys: Any) -> None:
        super().__init__(params, {"lr": lr, "initial_lr": lr, **keys})

    def move(self, weight: torch.Tensor, gradient: torch.Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        update = _divided(gradient, state, group["beta2"], group["eps"])
        size = update.norm(2) / update.numel() ** 0.5
        update.div_((size / group["clip_threshold"]).clamp_(min=1.0))
        positive = update > 0
        rates = state.get("rates")
        if rates is None:
            rates = state["rates"] = torch.full_like(weight, group["initial_lr"])
        else:
            bump = torch.where(positive == state["positive"], group["lr_bump"], -group["lr_bump"])
            rates.add_(bump).clamp_(group["min_lr"], group["max_lr"])
        state["positive"] = positive
        # What the schedule makes of the learning rate.
        now = rates * (group["lr"] / group["initial_lr"])
        weight.sub_(weight * now * group["weight_decay"]).sub_(update.mul_(now))


def _divided(gradient: torch.Tensor, state: dict[str, Any], beta2: float, eps: float) -> torch.Tensor:
    """A gradient, divided by the root of the running mean of its squares: of rows and columns, or of each element of a
    vector. Their first values are zeros, so that the first updates are large, and are limited."""
    square = gradient.square().add_(eps)
    if gradient.ndim < 2:
        mean = state.setdefault("exp_avg_sq", torch.zeros_like(square))
        return gradient * mean.lerp_(square, 1 - beta2).rsqrt()
    row = state.setdefault("exp_avg_sq_row", torch.zeros_like(square[..., 0]))
    column = state.setdefault("exp_avg_sq_col", torch.zeros_like(square[..., 0, :]))
    row.lerp_(square.mean(-1), 1 - beta2)
    column.lerp_(square.mean(-2), 1 - beta2)
    share = (row / row.mean(-1, keepdim=True)).rsqrt_().unsqueeze(-1)
    return share * column.unsqueeze(-2).rsqrt() * gradient


def _state_bytes(settings: AutomagicSettings, parameter: torch.Tensor) -> int:
    """Learning rates, signs, squares of rows and columns, and the master of a 16-bit parameter."""
    size = max(parameter.itemsize, torch.float32.itemsize)
    count = parameter.numel()
    return size * (rows_and_columns(parameter.shape) + count * (1 + is_short(parameter))) + count


def _refuses(settings: AutomagicSettings) -> str:
    if settings.min_lr <= settings.lr <= settings.max_lr:
        return ""
    return f"lr: {settings.lr} must be from min_lr, {settings.min_lr}, to max_lr, {settings.max_lr}"


KINDS = (
    OptimizerKind(
        AutomagicSettings,
        Automagic,
        _state_bytes,
        not_on={},
        retyped=with_master,
        float32_gradients=True,
        refuses=_refuses,
    ),
)
