"""Optimizers that need no schedule, since what is used is an average of what is trained (Defazio et al. 2024, "The Road
Less Scheduled"), of Meta's library."""

from typing import Literal

import torch

from optimizers.kinds import OptimizerKind
from optimizers.libraries import nothing_is_kept, of_its_type, of_library
from utils.settings.schema import OptimizerSettings
from utils.settings.values import Betas, NotNegative, Positive, Share

NO_SCHEDULE = "averages what is trained in place of a schedule"


class SGDScheduleFreeSettings(OptimizerSettings):
    """`type = "sgd_schedule_free"`: gradient descent that needs no schedule, nor the number of steps."""

    type: Literal["sgd_schedule_free"]
    """Algorithm; upper and lower case are alike."""
    momentum: Share = 0.9
    """How near to the average the gradients are taken: 1 would be there."""
    r: NotNegative = 0.0
    """Step n counts in the average by n^r."""
    weight_lr_power: NotNegative = 2.0
    """A step counts in the average by the largest learning rate so far to this power."""


class AdamWScheduleFreeSettings(OptimizerSettings):
    """`type = "adamw_schedule_free"`: AdamW that needs no schedule, nor the number of steps; `lr` is to be 1 to 10
    times that of AdamW."""

    type: Literal["adamw_schedule_free"]
    """Algorithm; upper and lower case are alike."""
    betas: Betas = (0.9, 0.999)
    """How near to the average the gradients are taken, and the decay rate of the running mean of their squares."""
    eps: Positive = 1e-8
    """Added to the denominator of the update."""
    r: NotNegative = 0.0
    """Step n counts in the average by n^r."""
    weight_lr_power: NotNegative = 2.0
    """A step counts in the average by the largest learning rate so far to this power."""


class RAdamScheduleFreeSettings(AdamWScheduleFreeSettings):
    """`type = "radam_schedule_free"`: as "adamw_schedule_free", without a need for warm-up either."""

    type: Literal["radam_schedule_free"]
    """Algorithm; upper and lower case are alike."""
    silent_sgd_phase: bool = True
    """The first steps, of which the denominator is not known yet, move nothing."""


def _bytes(settings: AdamWScheduleFreeSettings, parameter: torch.Tensor) -> int:
    return 2 * parameter.nbytes


def _sgd_bytes(settings: SGDScheduleFreeSettings, parameter: torch.Tensor) -> int:
    return parameter.nbytes


KINDS = tuple(
    OptimizerKind(
        settings,
        of_library(f"schedulefree.{name}"),
        state_bytes,
        not_on={},
        retyped=of_its_type,
        library="schedulefree",
        averages=True,
        constant_rate=NO_SCHEDULE,
        loses_small_steps=nothing_is_kept,
    )
    for settings, name, state_bytes in (
        (AdamWScheduleFreeSettings, "AdamWScheduleFree", _bytes),
        (RAdamScheduleFreeSettings, "RAdamScheduleFree", _bytes),
        (SGDScheduleFreeSettings, "SGDScheduleFree", _sgd_bytes),
    )
)
