"""Optimizers of ours that step each parameter by itself, with a float32 master of those that are kept in 16 bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from optimizers.rounding import MASTER, is_short


class ByParameter(torch.optim.Optimizer):
    """Its subclasses say what a step makes of one parameter. State is in float32, whatever the parameter's type."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    weight, gradient = self.taken(parameter)
                    self.move(weight, gradient, self.state[parameter], group)
                    self.give(parameter)

    def taken(self, parameter: nn.Parameter) -> tuple[torch.Tensor, torch.Tensor]:
        """What is stepped for a parameter, itself or its master, and its gradient in the same type."""
        state = self.state[parameter]
        if is_short(parameter) and MASTER not in state:
            state[MASTER] = parameter.detach().float()
        weight = state.get(MASTER, parameter.detach())
        return weight, parameter.grad.to(weight.dtype)

    def give(self, parameter: nn.Parameter) -> None:
        """A parameter gets what its master has become, rounded."""
        if MASTER in self.state[parameter]:
            parameter.detach().copy_(self.state[parameter][MASTER])

    def move(self, weight: torch.Tensor, gradient: torch.Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        """Steps a weight in place. At first, `state` has nothing but the master."""
        raise NotImplementedError


def kept_bytes(moments: int, parameter: torch.Tensor) -> int:
    """The bytes of so many float32 tensors of the parameter's size, and of the master of a 16-bit one."""
    size = max(parameter.itemsize, torch.float32.itemsize)
    return parameter.numel() * size * (moments + is_short(parameter))
