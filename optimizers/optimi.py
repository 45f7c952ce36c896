"""Optimizers of torch-optimi, which sums into 16-bit weights by Kahan's method: what a step lost is kept in 16 further
bits and added to the next one."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch

from optimizers.kinds import Groups, OptimizerKind, State
from optimizers.rounding import is_short
from utils.settings.schema import OptimizerSettings
from utils.settings.values import Betas, Positive

COMPENSATION = "kahan_comp"
MOMENTS = ("exp_avg", "exp_avg_sq")


class AdamWOptimiSettings(OptimizerSettings):
    """`type = "adamw_optimi"`: AdamW with all in the weights' type and Kahan sums, for full fine-tunes in bfloat16."""

    type: Literal["adamw_optimi"]
    """Algorithm; upper and lower case are alike."""
    betas: Betas = (0.9, 0.99)
    """Decay rates of the two running means, of the gradient and of its square."""
    eps: Positive = 1e-6
    """Added to the denominator of the update."""


class StableAdamWSettings(AdamWOptimiSettings):
    """`type = "stableadamw"`: as "adamw_optimi"; a parameter's step is shortened where its gradient outgrows the mean
    of its squares, in place of clipping."""

    type: Literal["stableadamw"]
    """Algorithm; upper and lower case are alike."""


def optimi(name: str) -> Callable[..., torch.optim.Optimizer]:
    """What builds an optimizer of torch-optimi."""

    def build(groups: Groups, **keys: Any) -> torch.optim.Optimizer:
        import optimi
        from optimi.utils import _default_to_triton

        class OnItsDevice(getattr(optimi, name)):
            """Chooses its kernels by where the parameters are, also where it goes on from another device."""

            def _init_group(self, group: dict[str, Any], *lists: Any, **named: Any) -> None:
                moved = [parameter for parameter in group["params"] if parameter.grad is not None]
                group["triton"] = _default_to_triton(moved)
                for parameter in moved if group["triton"] else ():
                    if MOMENTS[0] in self.state[parameter]:
                        # The kernels' scratch, which they alone have.
                        self.state[parameter].setdefault("mean_square", torch.zeros(1, device=parameter.device))
                super()._init_group(group, *lists, **named)

        return OnItsDevice(groups, **keys)

    return build


def compensated(parameter: torch.Tensor, value: torch.Tensor, state: State) -> State:
    """All is in the parameter's type. In 16 bits there is a compensation: what the weight lacks of the value."""
    kept = {key: state[key].to(parameter.dtype) for key in (*MOMENTS, "eps_sq") if key in state}
    further = {key: own for key, own in state.items() if key not in (*kept, COMPENSATION)}
    lacking = (value.double() - parameter.double()).to(parameter.dtype) if is_short(parameter) else None
    return {**further, **kept, COMPENSATION: lacking}


def optimi_bytes(moments: int, settings: Any, parameter: torch.Tensor) -> int:
    """So many moments, and a compensation in 16 bits."""
    return parameter.nbytes * (moments + is_short(parameter))


def _stable_bytes(settings: StableAdamWSettings, parameter: torch.Tensor) -> int:
    # It has its eps as a tensor beside them.
    return optimi_bytes(2, settings, parameter) + parameter.itemsize


KINDS = (
    OptimizerKind(
        AdamWOptimiSettings,
        optimi("AdamW"),
        partial(optimi_bytes, 2),
        not_on={},
        retyped=compensated,
        library="torch-optimi",
        counts_steps=True,
    ),
    OptimizerKind(
        StableAdamWSettings,
        optimi("StableAdamW"),
        _stable_bytes,
        not_on={},
        retyped=compensated,
        library="torch-optimi",
        counts_steps=True,
    ),
)
