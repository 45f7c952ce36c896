"""Gradient descent: plain, by torch; and with Nesterov's momentum in 8 bits."""

from typing import Any, Literal

import torch

from optimizers.adamw import with_master
from optimizers.by_parameter import ByParameter
from optimizers.eight_bits import Moment8bit, eight_bit_bytes
from optimizers.kinds import OptimizerKind, State
from optimizers.libraries import nothing_is_kept
from optimizers.rounding import is_short
from utils.settings.schema import OptimizerSettings
from utils.settings.values import Share


class SGDSettings(OptimizerSettings):
    """`type = "sgd"`: plain gradient descent."""

    type: Literal["sgd"]
    """Algorithm; upper and lower case are alike."""
    momentum: Share = 0.0
    """Fraction of the last update that is kept in the next one."""


def _state_bytes(settings: SGDSettings, parameter: torch.Tensor) -> int:
    return parameter.nbytes if settings.momentum else 0


def _retyped(parameter: torch.Tensor, value: torch.Tensor, state: State) -> State:
    """The kept update is of the parameter's type."""
    return {key: kept.to(parameter.dtype) for key, kept in state.items()}


class SGDNesterov8bitSettings(OptimizerSettings):
    """`type = "sgd_nesterov8bit"`: gradient descent with Nesterov's momentum, which is kept in 8 bits."""

    type: Literal["sgd_nesterov8bit"]
    """Algorithm; upper and lower case are alike."""
    momentum: Share = 0.9
    """Fraction of the last update that is kept in the next one."""


class SGDNesterov8bit(ByParameter):
    """As `torch.optim.SGD` with `nesterov`, but for the rounding of the momentum; that of bitsandbytes takes the
    argument `nesterov` and does without it."""

    def __init__(self, params: Any, lr: float, weight_decay: float, momentum: float) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self._velocity = Moment8bit("momentum_buffer", signed=True)

    def move(self, weight: torch.Tensor, gradient: torch.Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        gradient = gradient.add(weight, alpha=group["weight_decay"])
        velocity = self._velocity.read(state, weight).mul(group["momentum"]).add_(gradient)
        weight.add_(gradient.add_(velocity, alpha=group["momentum"]), alpha=-group["lr"])
        self._velocity.write(state, velocity)


def _eight_bit_bytes(settings: SGDNesterov8bitSettings, parameter: torch.Tensor) -> int:
    """Beside the master of a 16-bit parameter."""
    return eight_bit_bytes(1, settings, parameter) + is_short(parameter) * 4 * parameter.numel()


KINDS = (
    OptimizerKind(
        SGDSettings,
        torch.optim.SGD,
        _state_bytes,
        not_on={},
        retyped=_retyped,
        library="torch",
        loses_small_steps=nothing_is_kept,
    ),
    OptimizerKind(
        SGDNesterov8bitSettings,
        SGDNesterov8bit,
        _eight_bit_bytes,
        not_on={},
        retyped=with_master,
        float32_gradients=True,
        library="ours, with codes of bitsandbytes",
    ),
)
