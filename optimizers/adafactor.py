"""Optimizers that keep second moments of rows and columns instead of each weight's."""

from __future__ import annotations

from math import prod
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from optimizers.kinds import Groups, OptimizerKind, State
from optimizers.libraries import nothing_is_kept, of_its_type, of_library
from optimizers.rounding import is_short
from utils.settings.schema import OptimizerSettings
from utils.settings.values import Positive, Share

TwoEps = Annotated[tuple[Positive, Positive], Field(strict=False)]
ThreeBetas = Annotated[tuple[Share, Share, Share], Field(strict=False)]


class AdafactorSettings(OptimizerSettings):
    """`type = "adafactor"`: Adafactor of transformers: almost no state; with `beta1`, as much as half of Adam's."""

    type: Literal["adafactor"]
    """Algorithm; upper and lower case are alike."""
    eps: TwoEps = (1e-30, 1e-3)
    """Added to squares of gradients; and the least size of a weight by which `scale_parameter` scales."""
    clip_threshold: Positive = 1.0
    """Root mean square to which an update is limited."""
    decay_rate: Annotated[float, Field(lt=0)] = -0.8
    """The mean of squares is renewed by n^decay_rate at step n."""
    beta1: Share | None = None
    """Decay rate of the running mean of updates; without: none."""
    scale_parameter: bool = False
    """Multiply the learning rate of a parameter by the root mean square of its weights."""
    relative_step: bool = False
    """Multiply `lr` by the smaller of 0.01 and 1 / sqrt(step); the paper's is with `lr = 1`."""
    warmup_init: bool = False
    """With `relative_step`: by the smaller of step / 1,000,000 and 1 / sqrt(step)."""


class CAMESettings(OptimizerSettings):
    """`type = "came"`: Adafactor with a momentum, whose steps are smaller where updates disagree (Luo et al. 2023)."""

    type: Literal["came"]
    """Algorithm; upper and lower case are alike."""
    betas: ThreeBetas = (0.9, 0.999, 0.9999)
    """Decay rates of the running means of the update, of squares of the gradient, and of the update's deviations."""
    eps1: Positive = 1e-30
    """Added to squares of gradients."""
    eps2: Positive = 1e-16
    """Added to squares of deviations."""
    clip_threshold: Positive = 1.0
    """Root mean square to which an update is limited before it is averaged."""


def _build(groups: Groups, **keys: Any) -> torch.optim.Optimizer:
    from transformers.optimization import Adafactor

    class Scaled(Adafactor):
        """Its relative step is multiplied by the learning rate, which would otherwise mean nothing."""

        @staticmethod
        def _get_lr(param_group: dict[str, Any], param_state: dict[str, Any]) -> float:
            rate = Adafactor._get_lr(param_group, param_state)
            return rate * param_group["lr"] if param_group["relative_step"] else rate

    lr = keys.pop("lr")
    # Groups have their own lr, which the class would not take beside relative steps.
    return Scaled(groups, **keys, lr=None if keys["relative_step"] else lr)


def rows_and_columns(shape: torch.Size) -> int:
    """The numbers that are kept of the rows and the columns of the matrices of a tensor, or of each of its elements."""
    if len(shape) < 2:
        return prod(shape)
    return prod(shape[:-1]) + prod([*shape[:-2], shape[-1]])


def _adafactor_bytes(settings: AdafactorSettings, parameter: torch.Tensor) -> int:
    size = max(parameter.itemsize, torch.float32.itemsize)
    momentum = parameter.numel() if settings.beta1 is not None else 0
    # With the size of the weights, a number.
    return size * (rows_and_columns(parameter.shape) + momentum + 1)


def _in_float32(parameter: torch.Tensor, value: torch.Tensor, state: State) -> State:
    """Moments are in float32 at least."""
    dtype = torch.float32 if is_short(parameter) else parameter.dtype
    return {
        key: kept.to(dtype) if isinstance(kept, torch.Tensor) and kept.is_floating_point() else kept
        for key, kept in state.items()
    }


def _came_bytes(settings: CAMESettings, parameter: torch.Tensor) -> int:
    times = 2 if parameter.ndim > 1 else 1
    # With the size of the weights, a number.
    return parameter.itemsize * (parameter.numel() + times * rows_and_columns(parameter.shape) + 1)


def _refuses(settings: AdafactorSettings) -> str:
    alone = settings.warmup_init and not settings.relative_step
    return "warmup_init: changes how the relative step begins: write relative_step = true too" if alone else ""


KINDS = (
    OptimizerKind(
        AdafactorSettings,
        _build,
        _adafactor_bytes,
        not_on={},
        retyped=_in_float32,
        library="transformers",
        refuses=_refuses,
        loses_small_steps=nothing_is_kept,
    ),
    OptimizerKind(
        CAMESettings,
        of_library("pytorch_optimizer.CAME"),
        _came_bytes,
        not_on={},
        retyped=of_its_type,
        library="pytorch-optimizer",
        loses_small_steps=nothing_is_kept,
    ),
)
