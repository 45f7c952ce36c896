"""The D-Adaptation family (Defazio and Mishchenko 2023, "Learning-Rate-Free Learning by D-Adaptation"), in the third
version of its authors."""

from __future__ import annotations

from functools import partial
from math import sqrt
from typing import Any, Literal

import torch

from optimizers import sums
from optimizers.adamw import with_master
from optimizers.by_parameter import kept_bytes
from optimizers.distance import ByDistance, DistanceSettings, decay, dot
from optimizers.kinds import OptimizerKind
from utils.settings.values import Betas, NotNegative, Positive, Share


class DAdaptAdamSettings(DistanceSettings):
    """`type = "dadaptadam"`: Adam that finds its learning rate; `lr` is a factor on it, and stays 1. Half as much state
    again as Adam's."""

    type: Literal["dadaptadam"]
    """Algorithm; upper and lower case are alike."""
    betas: Betas = (0.9, 0.999)
    """Decay rates of the two running means, of the gradient and of its square."""
    eps: Positive = 1e-8
    """Added to the denominator of the update."""
    decouple: bool = False
    """Decay weights as AdamW does, and not by their gradients."""
    use_bias_correction: bool = False
    """Correct the running means for their first steps, as Adam does."""


class DAdaptLionSettings(DistanceSettings):
    """`type = "dadaptlion"`: Lion that finds its learning rate."""

    type: Literal["dadaptlion"]
    """Algorithm; upper and lower case are alike."""
    betas: Betas = (0.9, 0.999)
    """Of the mean whose sign is the step, and of the mean that is kept."""


class DAdaptSGDSettings(DistanceSettings):
    """`type = "dadaptsgd"`: gradient descent that finds its learning rate."""

    type: Literal["dadaptsgd"]
    """Algorithm; upper and lower case are alike."""
    momentum: Share = 0.9
    """Fraction of the weights that a step keeps on the way to where the sum of gradients leads."""


class DAdaptAdaGradSettings(DistanceSettings):
    """`type = "dadaptadagrad"`: AdaGrad that finds its learning rate, for sparse gradients above all."""

    type: Literal["dadaptadagrad"]
    """Algorithm; upper and lower case are alike."""
    momentum: Share = 0.0
    """Fraction of the weights that a step keeps on the way to where the sum of gradients leads."""
    eps: NotNegative = 0.0
    """Added to the denominator of the update."""


class _ByNumerator(ByDistance):
    """Those whose distance is the running mean of a sum, divided by another sum."""

    def __init__(self, params: Any, **keys: Any) -> None:
        super().__init__(params, numerator_weighted=0.0, **keys)

    def adapt(self, totals: list[float], shared: dict[str, Any], rate: float) -> dict[str, Any] | None:
        gained, size = totals
        if size == 0:
            return None
        beta = sqrt(shared["betas"][1])
        numerator = beta * shared["numerator_weighted"] + (1 - beta) * gained
        found = min(numerator / ((1 - beta) * size), shared["d"] * shared["growth_rate"])
        return {"d": max(shared["d"], found), "numerator_weighted": numerator}


class DAdaptAdam(_ByNumerator):
    """As `dadaptation.DAdaptAdam`; sums are made over all processes, and state is in float32."""

    def collect(
        self, weight: torch.Tensor, gradient: torch.Tensor, state: dict[str, Any], group: dict[str, Any], rate: float
    ) -> tuple[torch.Tensor, ...]:
        if "s" not in state:
            state |= {key: torch.zeros_like(weight) for key in ("s", "exp_avg", "exp_avg_sq")}
        beta1, beta2 = group["betas"]
        mean, square, walked = state["exp_avg"], state["exp_avg_sq"], state["s"]
        gained = dot(gradient, walked / square.sqrt().add_(group["eps"])) * rate
        mean.mul_(beta1).add_(gradient, alpha=rate * (1 - beta1))
        square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        walked.mul_(sqrt(beta2)).add_(gradient, alpha=rate * (1 - sqrt(beta2)))
        return gained, walked.abs().sum()

    def finish(self, weight: torch.Tensor, state: dict[str, Any], group: dict[str, Any], rate: float) -> None:
        decay(weight, group, rate)
        weight.addcdiv_(state["exp_avg"], state["exp_avg_sq"].sqrt().add_(group["eps"]), value=-1)


class DAdaptLion(_ByNumerator):
    """As `dadaptation.DAdaptLion`; sums are made over all processes, and state is in float32."""

    def collect(
        self, weight: torch.Tensor, gradient: torch.Tensor, state: dict[str, Any], group: dict[str, Any], rate: float
    ) -> tuple[torch.Tensor, ...]:
        if "s" not in state:
            state |= {key: torch.zeros_like(weight) for key in ("s", "exp_avg")}
        beta1, beta2 = group["betas"]
        mean, walked = state["exp_avg"], state["s"]
        # A step does not depend on the distance that it finds.
        update = mean.lerp(gradient, 1 - beta1).sign_()
        decay(weight, group, rate)
        weight.add_(update, alpha=-rate)
        mean.mul_(beta2).add_(gradient, alpha=(1 - beta2) * rate)
        gained = dot(update, walked) * rate
        walked.mul_(sqrt(beta2)).add_(update, alpha=(1 - sqrt(beta2)) * rate)
        return gained, walked.abs().sum()

    def finish(self, weight: torch.Tensor, state: dict[str, Any], group: dict[str, Any], rate: float) -> None:
        """It has moved."""


class DAdaptSGD(ByDistance):
    """As `dadaptation.DAdaptSGD`; sums are made over all processes, and state is in float32."""

    def __init__(self, params: Any, **keys: Any) -> None:
        super().__init__(params, numerator_weighted=0.0, g0_norm=0.0, decouple=False, **keys)

    def rate(self, shared: dict[str, Any]) -> float:
        if not shared["g0_norm"]:
            squares = [self.taken(one)[1].square().sum() for _, one in self._moved()]
            norm = sqrt(self.total([sums.read(squares)])[0])
            for group in self.param_groups:
                group["g0_norm"] = norm
        return shared["d"] * shared["lr"] / shared["g0_norm"] if shared["g0_norm"] else 0.0

    def collect(
        self, weight: torch.Tensor, gradient: torch.Tensor, state: dict[str, Any], group: dict[str, Any], rate: float
    ) -> tuple[torch.Tensor, ...]:
        if "s" not in state:
            state |= {"x0": weight.clone(), "s": torch.zeros_like(weight)}
        gained = dot(gradient, state["s"]) * rate
        state["s"].add_(gradient, alpha=rate)
        return gained, state["s"].square().sum()

    def adapt(self, totals: list[float], shared: dict[str, Any], rate: float) -> dict[str, Any] | None:
        gained, square = totals
        if square == 0:
            return None
        numerator = shared["numerator_weighted"] + gained
        found = min(2 * numerator / sqrt(square), shared["d"] * shared["growth_rate"])
        return {"d": max(shared["d"], found), "numerator_weighted": numerator}

    def finish(self, weight: torch.Tensor, state: dict[str, Any], group: dict[str, Any], rate: float) -> None:
        weight.lerp_(state["x0"] - state["s"], 1 - group["momentum"])


class DAdaptAdaGrad(ByDistance):
    """As `dadaptation.DAdaptAdaGrad`; sums are made over all processes, and state is in float32."""

    rows = 3

    def __init__(self, params: Any, **keys: Any) -> None:
        super().__init__(params, gsq_weighted=0.0, decouple=False, **keys)

    def collect(
        self, weight: torch.Tensor, gradient: torch.Tensor, state: dict[str, Any], group: dict[str, Any], rate: float
    ) -> tuple[torch.Tensor, ...]:
        if "sk" not in state:
            state |= {"x0": weight.clone(), "sk": torch.zeros_like(weight), "alpha_k": torch.full_like(weight, 1e-6)}
        walked, squares = state["sk"], state["alpha_k"]
        squares.addcmul_(gradient, gradient)
        denominator = squares.sqrt().add_(group["eps"])
        walked.add_(gradient, alpha=rate)
        power = gradient.square().div_(denominator).sum() * rate**2
        return power, walked.square().div_(denominator).sum(), walked.abs().sum()

    def adapt(self, totals: list[float], shared: dict[str, Any], rate: float) -> dict[str, Any] | None:
        power, weighted, size = totals
        if size == 0:
            return None
        powers = shared["gsq_weighted"] + power
        found = min((weighted - powers) / size, shared["d"] * shared["growth_rate"])
        return {"d": max(shared["d"], found), "gsq_weighted": powers}

    def finish(self, weight: torch.Tensor, state: dict[str, Any], group: dict[str, Any], rate: float) -> None:
        goal = state["x0"] - state["sk"] / state["alpha_k"].sqrt().add_(group["eps"])
        weight.lerp_(goal, 1 - group["momentum"])


def _bytes(moments: int, settings: DistanceSettings, parameter: torch.Tensor) -> int:
    return kept_bytes(moments, parameter)


KINDS = tuple(
    OptimizerKind(
        settings,
        optimizer,
        partial(_bytes, moments),
        not_on={},
        retyped=with_master,
        float32_gradients=True,
        sums=True,
    )
    for settings, optimizer, moments in (
        (DAdaptAdamSettings, DAdaptAdam, 3),
        (DAdaptLionSettings, DAdaptLion, 2),
        (DAdaptSGDSettings, DAdaptSGD, 2),
        (DAdaptAdaGradSettings, DAdaptAdaGrad, 3),
    )
)
