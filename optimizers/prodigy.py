"""Prodigy, Adam that finds its learning rate (Mishchenko and Defazio 2024, "Prodigy: An Expeditiously Adaptive
Parameter-Free Learner"); keys as in its authors' library."""

from __future__ import annotations

from math import ceil, sqrt
from typing import Any, Literal

import torch

from optimizers.adamw import with_master
from optimizers.by_parameter import kept_bytes
from optimizers.distance import ByDistance, DistanceSettings, decay, dot
from optimizers.kinds import OptimizerKind
from utils.settings.values import Betas, Count, Positive, Share


class ProdigySettings(DistanceSettings):
    """`type = "prodigy"`: Adam that finds its learning rate; `lr` is a factor on it, and stays 1. Twice Adam's state,
    less with `slice_p`. It takes any schedule; a cosine suits it."""

    type: Literal["prodigy"]
    """Algorithm; upper and lower case are alike."""
    betas: Betas = (0.9, 0.999)
    """Decay rates of the two running means, of the gradient and of its square."""
    beta3: Share | None = None
    """Decay rate of the sums by which the distance is found; without: the root of the second of `betas`."""
    eps: Positive = 1e-8
    """Added to the denominator of the update, times the distance."""
    d_coef: Positive = 1.0
    """Factor on the distance: the one to change where steps are too large or too small."""
    decouple: bool = True
    """Decay weights as AdamW does, and not by their gradients."""
    use_bias_correction: bool = False
    """Correct the running means for their first steps, as Adam does."""
    safeguard_warmup: bool = False
    """Leave the learning rate out of the estimate's denominator, for schedules that begin with warm-up."""
    slice_p: Count = 1
    """Find the distance by every so manieth weight; 11 is reasonable, and saves nearly half of the state."""


class Prodigy(ByDistance):
    """As `prodigyopt.Prodigy`; sums are made over all processes, and state is in float32."""

    def __init__(self, params: Any, **keys: Any) -> None:
        super().__init__(params, d_max=keys["d0"], d_numerator=0.0, **keys)

    @staticmethod
    def _beta3(group: dict[str, Any]) -> float:
        return sqrt(group["betas"][1]) if group["beta3"] is None else group["beta3"]

    def collect(
        self, weight: torch.Tensor, gradient: torch.Tensor, state: dict[str, Any], group: dict[str, Any], rate: float
    ) -> tuple[torch.Tensor, ...]:
        part = slice(None, None, group["slice_p"])
        if "p0" not in state:
            state["p0"] = weight.flatten()[part].clone()
            state["s"] = torch.zeros_like(state["p0"])
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(weight), torch.zeros_like(weight)
        d, relative = group["d"], group["d"] / group["d0"]
        beta1, beta2 = group["betas"]
        sliced = gradient.flatten()[part]
        numerator = dot(sliced, state["p0"] - weight.flatten()[part]) * (relative * rate)
        state["exp_avg"].mul_(beta1).add_(gradient, alpha=d * (1 - beta1))
        state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=d * d * (1 - beta2))
        scale = relative * (d if group["safeguard_warmup"] else rate)
        state["s"].mul_(self._beta3(group)).add_(sliced, alpha=scale)
        return numerator, state["s"].abs().sum()

    def adapt(self, totals: list[float], shared: dict[str, Any], rate: float) -> dict[str, Any] | None:
        gained, denominator = totals
        if denominator == 0:
            return None
        d, d_max = shared["d"], shared["d_max"]
        numerator = shared["d_numerator"] * self._beta3(shared) + gained
        found = shared["d_coef"] * numerator / denominator
        if d == shared["d0"]:
            d = max(d, found)
        d_max = max(d_max, found)
        return {"d": min(d_max, d * shared["growth_rate"]), "d_max": d_max, "d_numerator": numerator}

    def finish(self, weight: torch.Tensor, state: dict[str, Any], group: dict[str, Any], rate: float) -> None:
        decay(weight, group, rate)
        denominator = state["exp_avg_sq"].sqrt().add_(group["d"] * group["eps"])
        weight.addcdiv_(state["exp_avg"], denominator, value=-rate)


def _state_bytes(settings: ProdigySettings, parameter: torch.Tensor) -> int:
    size = max(parameter.itemsize, torch.float32.itemsize)
    return kept_bytes(2, parameter) + 2 * size * ceil(parameter.numel() / settings.slice_p)


KINDS = (
    OptimizerKind(
        ProdigySettings,
        Prodigy,
        _state_bytes,
        not_on={},
        retyped=with_master,
        float32_gradients=True,
        sums=True,
    ),
)
