"""Plain gradient descent, by torch."""

from typing import Literal

import torch

from optimizers.kinds import OptimizerKind
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


KINDS = (OptimizerKind(SGDSettings, torch.optim.SGD, _state_bytes, not_on={}),)
