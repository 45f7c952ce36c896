"""Prodigy without a schedule, of the library prodigy-plus-schedule-free."""

from __future__ import annotations

import logging
from collections.abc import Callable
from math import prod
from typing import Any, Literal

import torch

from optimizers import sums
from optimizers.kinds import Groups, OptimizerKind, State
from optimizers.schedule_free import NO_SCHEDULE
from utils.settings.schema import OptimizerSettings
from utils.settings.values import Betas, Natural, NotNegative, Positive, Share

logger = logging.getLogger(__name__)

SLICE = 11
"""Every so manieth weight tells of the distance."""
LEAST_FACTORED = 32
"""Tensors with a side of so many have moments of rows and columns."""


class ProdigyPlusSettings(OptimizerSettings):
    """`type = "prodigy_plus_schedule_free"`: finds its learning rate, and needs no schedule; about as much state as the
    weights. `lr` is a factor, and stays 1."""

    type: Literal["prodigy_plus_schedule_free"]
    """Algorithm; upper and lower case are alike."""
    lr: Positive = 1.0
    """Factor on the learning rate that is found."""
    weight_decay: NotNegative = 0.0
    """Decay of the weights per step, times the learning rate."""
    betas: Betas = (0.9, 0.99)
    """How near to the average the gradients are taken, and the decay rate of the running mean of their squares."""
    beta3: Share | None = None
    """Decay rate of the sums by which the distance is found; without: the root of the second of `betas`."""
    weight_decay_by_lr: bool = True
    """Multiply `weight_decay` by the learning rate."""
    d0: Positive = 1e-6
    """Distance with which the search begins."""
    d_coef: Positive = 1.0
    """Factor on the distance."""
    d_limiter: bool = True
    """Let the distance grow by at most a fifth in a step."""
    prodigy_steps: Natural = 0
    """After so many steps the learning rate stays, and what found it takes no more memory; 0: never."""
    schedulefree_c: NotNegative = 0.0
    """Weight of newer steps in the average; 0: all count alike."""
    eps: Positive = 1e-8
    """Added to the denominator of the update."""
    factored: bool = True
    """Keep squares of rows and columns instead of each weight's."""
    factored_fp32: bool = True
    """Keep those in float32."""
    use_bias_correction: bool = False
    """Correct the running mean for its first steps, as RAdam does."""
    use_stableadamw: bool = True
    """Shorten updates that are larger than usual."""
    use_schedulefree: bool = True
    """Average what is trained; without it, a momentum takes its place, and a schedule is wanted."""
    use_speed: bool = False
    """Find the distance by progress alone, with less state."""
    stochastic_rounding: bool = True
    """Round weights in bfloat16 up or down by chance, so that small steps are not lost."""
    use_cautious: bool = False
    """Leave out of an update what its gradient disagrees with."""
    use_grams: bool = False
    """Take an update's sign from the gradient."""
    use_adopt: bool = False
    """Divide by squares without the newest gradient."""
    use_orthograd: bool = False
    """Take of a gradient what is orthogonal to the weights."""
    use_focus: bool = False
    """Update by signs alone, towards the mean of the weights; without `factored`."""


def _build(groups: Groups, **keys: Any) -> torch.optim.Optimizer:
    from prodigyplus import ProdigyPlusScheduleFree

    class Summing(ProdigyPlusScheduleFree):
        """Finds the distance by sums over all processes, and tells what it has to tell in the log."""

        def __init__(self, *args: Any, **keys: Any) -> None:
            self.total: sums.Total = sums.alone
            super().__init__(*args, **keys)

        def log(self, message: str) -> None:
            logger.info("[optimizer] %s", message)

        @torch.no_grad()
        def update_d_stats_and_reset(self, group: dict[str, Any]) -> None:
            running = self.get_running_values_for_group(group)
            own = sums.read(running)
            if 0 < group["prodigy_steps"] <= group["k"]:
                return
            for sum_, of_all in zip(running, self.total([[one] for one in own]), strict=True):
                sum_.fill_(of_all)
            super().update_d_stats_and_reset(group)

        @torch.no_grad()
        def step(self, closure: Callable[[], Any] | None = None) -> None:
            if all(parameter.grad is None for group in self.param_groups for parameter in group["params"]):
                # A stage with nothing to train takes part in the sums.
                for group in self.param_groups:
                    for parameter in group["params"]:
                        parameter.grad = torch.zeros_like(parameter)
            super().step(closure)

    # One distance for all: groups are others on each stage, and differ in their decay alone.
    return Summing(groups, **keys, split_groups=False)


def _retyped(parameter: torch.Tensor, value: torch.Tensor, state: State) -> State:
    """What tells of the distance is in bfloat16, unless the weights are in float16; factored moments are in float32."""
    other = torch.float16 if parameter.dtype == torch.float16 else torch.bfloat16
    types = {"p0": other, "s": other, "exp_avg": parameter.dtype, "exp_avg_sq": parameter.dtype, "z": parameter.dtype}
    return {key: kept.to(types[key]) if key in types else kept for key, kept in state.items()}


def _state_bytes(settings: ProdigyPlusSettings, parameter: torch.Tensor) -> int:
    shape, size = sorted(parameter.shape), parameter.itemsize
    averaged = parameter.nbytes
    factored = settings.factored and not settings.use_focus and len(shape) > 1 and shape[-1] >= LEAST_FACTORED
    if factored:
        # All but the largest side, and all but the next.
        kept = prod(shape[:-1]) + prod([*shape[:-2], shape[-1]])
        squares = kept * (torch.float32.itemsize if settings.factored_fp32 else size)
    else:
        squares = parameter.nbytes
    sliced = -(-parameter.numel() // SLICE)
    # In 16 bits: the first weights, and a sum of gradients.
    distance = sliced * torch.bfloat16.itemsize * (1 if settings.use_speed else 2)
    return averaged + squares + distance


KINDS = (
    OptimizerKind(
        ProdigyPlusSettings,
        _build,
        _state_bytes,
        not_on={},
        retyped=_retyped,
        library="prodigy-plus-schedule-free",
        averages=True,
        constant_rate=NO_SCHEDULE,
        sums=True,
        loses_small_steps=lambda settings: not settings.stochastic_rounding,
    ),
)
