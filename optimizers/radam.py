"""Variants of Adam that torch has: without a need for warm-up, and with Nesterov's momentum."""

from typing import Literal

import torch

from optimizers.kinds import OptimizerKind
from optimizers.libraries import nothing_is_kept, of_its_type, of_library
from utils.settings.schema import OptimizerSettings
from utils.settings.values import Betas, Positive


class RAdamSettings(OptimizerSettings):
    """`type = "radam"`: AdamW that makes its first steps without the denominator it cannot know yet: less warm-up."""

    type: Literal["radam"]
    """Algorithm; upper and lower case are alike."""
    betas: Betas = (0.9, 0.999)
    """Decay rates of the two running means, of the gradient and of its square."""
    eps: Positive = 1e-8
    """Added to the denominator of the update."""


class NAdamSettings(RAdamSettings):
    """`type = "nadam"`: AdamW with Nesterov's momentum."""

    type: Literal["nadam"]
    """Algorithm; upper and lower case are alike."""
    momentum_decay: Positive = 4e-3
    """How fast the momentum comes to its full value."""


def _two_moments(settings: RAdamSettings, parameter: torch.Tensor) -> int:
    return 2 * parameter.nbytes


def _nadam_bytes(settings: NAdamSettings, parameter: torch.Tensor) -> int:
    # It has the product of its momenta as a tensor beside them.
    return _two_moments(settings, parameter) + torch.float32.itemsize


KINDS = tuple(
    OptimizerKind(
        settings,
        of_library(path, decoupled_weight_decay=True),
        state_bytes,
        not_on={},
        retyped=of_its_type,
        library="torch",
        loses_small_steps=nothing_is_kept,
    )
    for settings, path, state_bytes in (
        (RAdamSettings, "torch.optim.RAdam", _two_moments),
        (NAdamSettings, "torch.optim.NAdam", _nadam_bytes),
    )
)
