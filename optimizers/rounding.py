"""How 16-bit weights keep what a step changes below their last digit.

Shapes: any; all of a weight's are alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch

from utils.diffusion import seeds

Rounding = Literal["master", "kahan", "stochastic", "nearest"]
MASTER, COMPENSATION, DRAWS = "master", "compensation", "draws"


def is_short(parameter: torch.Tensor) -> bool:
    """Whether a parameter has 16 bits."""
    return parameter.dtype.itemsize < torch.float32.itemsize


def values_to_step(parameter: torch.Tensor, state: dict[str, Any], rounding: Rounding) -> torch.Tensor:
    """The float32 values of a 16-bit parameter that are stepped, as exact as they are known. The state may come from
    another way of rounding."""
    if MASTER not in state:
        values = parameter.detach().float()
        if state.get(COMPENSATION) is not None:
            values = values + state[COMPENSATION].float()
        if rounding != "master":
            return values
        state.pop(COMPENSATION, None)
        state[MASTER] = values
    return state[MASTER] if rounding == "master" else state.pop(MASTER)


def round_into(
    parameters: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    states: Sequence[dict[str, Any]],
    names: Sequence[object],
    rounding: Rounding,
) -> None:
    """Gives 16-bit parameters their stepped values.

    By Kahan's summation, what the parameter lacks of the value is kept in as many bits. By chance, it is rounded up as
    often as it is near the number above (Gupta et al. 2015, "Deep Learning with Limited Numerical Precision", section
    3), so that it is right in the mean.

    Args:
        names: with which, and the number of the draw, the chance is seeded: the same on all data ranks.
    """
    if rounding == "stochastic":
        for parameter, value, state, name in zip(parameters, values, states, names, strict=True):
            state[DRAWS] = state.get(DRAWS, 0) + 1
            seed = seeds.derive(0, "rounding", name, state[DRAWS])
            draw = torch.Generator(value.device).manual_seed(seed)
            parameter.copy_(by_chance(value, draw))
        return
    torch._foreach_copy_(list(parameters), list(values))
    if rounding == "kahan":
        for parameter, value, state in zip(parameters, values, states, strict=True):
            state[COMPENSATION] = (value - parameter.float()).to(parameter.dtype)


def by_chance(values: torch.Tensor, draw: torch.Generator) -> torch.Tensor:
    """Float32 values as numbers of bfloat16, still in float32: one of the two beside each, the nearer more often."""
    below = torch.randint(0, 1 << 16, values.shape, dtype=torch.int32, device=values.device, generator=draw)
    return ((values.view(torch.int32) + below) & -(1 << 16)).view(torch.float32)
