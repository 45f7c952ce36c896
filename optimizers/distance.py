"""Optimizers that find their learning rate: by a lower bound of the distance from the first weights to the best ones,
which grows as training shows that they are further away (Defazio and Mishchenko 2023, "Learning-Rate-Free Learning by
D-Adaptation"; Mishchenko and Defazio 2024, "Prodigy").

The bound is one for all parameters together, and a step changes it by sums over all of them. Each process has some: see
`sums.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import nn

from optimizers import sums
from optimizers.by_parameter import ByParameter
from utils.settings.schema import OptimizerSettings
from utils.settings.values import NotNegative, Positive


class DistanceSettings(OptimizerSettings):
    """Keys of optimizers that find their learning rate."""

    lr: Positive = 1.0
    """Factor on the learning rate that is found."""
    weight_decay: NotNegative = 0.0
    """Decay of the weights per step, times the learning rate."""
    d0: Positive = 1e-6
    """Distance with which the search begins."""
    growth_rate: Annotated[float, Field(gt=1)] | None = None
    """Factor by which the distance may grow in a step; without: any."""


class ByDistance(ByParameter):
    """A step collects what each parameter gives to the sums, renews the distance, and moves the parameters.

    Attributes:
        total: adds sums up over all processes; all of them take their steps together.
    """

    def __init__(self, params: Any, lr: float, growth_rate: float | None = None, **keys: Any) -> None:
        self.total: sums.Total = sums.alone
        unlimited = float("inf") if growth_rate is None else growth_rate
        super().__init__(params, {"lr": lr, "growth_rate": unlimited, "d": keys["d0"], "k": 0, **keys})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        # What is found is the same in all groups.
        shared = self.param_groups[0]
        rate = self.rate(shared)
        collected = []
        for group, parameter in self._moved():
            weight, gradient = self._decayed(parameter, group)
            collected.append(self.collect(weight, gradient, self.state[parameter], group, rate))
        numbers = sums.read([one for of_parameter in collected for one in of_parameter])
        rows = [numbers[row :: self.rows] for row in range(self.rows)]
        found = self.adapt(self.total(rows), shared, rate)
        if found is None:
            return
        for group in self.param_groups:
            group.update(found, k=group["k"] + 1)
        for group, parameter in self._moved():
            self.finish(self.taken(parameter)[0], self.state[parameter], group, rate)
            self.give(parameter)

    rows = 2
    """How many sums there are."""

    def _moved(self) -> list[tuple[dict[str, Any], nn.Parameter]]:
        return [
            (group, parameter)
            for group in self.param_groups
            for parameter in group["params"]
            if parameter.grad is not None
        ]

    def _decayed(self, parameter: nn.Parameter, group: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        weight, gradient = self.taken(parameter)
        if group["weight_decay"] and not group.get("decouple", True):
            gradient = gradient.add(weight, alpha=group["weight_decay"])
        return weight, gradient

    def rate(self, shared: dict[str, Any]) -> float:
        """The learning rate of a step, which is that of before it."""
        correction = 1.0
        if shared.get("use_bias_correction"):
            beta1, beta2 = shared["betas"]
            correction = (1 - beta2 ** (shared["k"] + 1)) ** 0.5 / (1 - beta1 ** (shared["k"] + 1))
        return shared["d"] * shared["lr"] * correction

    def collect(
        self, weight: torch.Tensor, gradient: torch.Tensor, state: dict[str, Any], group: dict[str, Any], rate: float
    ) -> tuple[torch.Tensor, ...]:
        """Renews the state of a parameter; returns its summands, as many as there are `rows`."""
        raise NotImplementedError

    def adapt(self, totals: list[float], shared: dict[str, Any], rate: float) -> dict[str, Any] | None:
        """What groups hold after a step; None if there is nothing to go by, and no step is taken."""
        raise NotImplementedError

    def finish(self, weight: torch.Tensor, state: dict[str, Any], group: dict[str, Any], rate: float) -> None:
        """Moves a weight in place."""
        raise NotImplementedError


def decay(weight: torch.Tensor, group: dict[str, Any], rate: float) -> None:
    """Decay that is not part of the gradient."""
    if group["weight_decay"] and group.get("decouple", True):
        weight.mul_(1 - group["weight_decay"] * rate)


def dot(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    return torch.dot(first.flatten(), second.flatten())
