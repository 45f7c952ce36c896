"""Plain gradient descent, by torch."""

from typing import Literal

import torch

from optimizers.kinds import OptimizerKind, State
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


KINDS = (OptimizerKind(SGDSettings, torch.optim.SGD, _state_bytes, not_on={}, retyped=_retyped),)
