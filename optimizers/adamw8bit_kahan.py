"""AdamW with its moments in 8 bits, and Kahan sums into 16-bit weights: 4 bytes of state a weight where a float32
master and moments take 12."""

from __future__ import annotations

from typing import Any, Literal

import torch

from optimizers.adamw import HalfLifeSettings
from optimizers.by_parameter import ByParameter
from optimizers.eight_bits import Moment8bit, eight_bit_bytes
from optimizers.kinds import OptimizerKind, State
from optimizers.rounding import COMPENSATION, is_short
from utils.settings.values import Betas, Positive


class AdamW8bitKahanSettings(HalfLifeSettings):
    """`type = "adamw8bitkahan"`: AdamW with moments in 8 bits, which keeps what 16-bit weights lose of a step in 16
    further bits: for full fine-tunes in bfloat16 with little memory."""

    type: Literal["adamw8bitkahan"]
    """Algorithm; upper and lower case are alike."""
    betas: Betas = (0.9, 0.999)
    """Decay rates of the two running means, of the gradient and of its square."""
    eps: Positive = 1e-8
    """Added to the denominator of the update."""
    stabilize: bool = True
    """Shorten the step of a parameter whose gradient outgrows the mean of its squares (StableAdamW, Wortsman et al.
    2023)."""


class AdamW8bitKahan(ByParameter):
    """AdamW (Loshchilov and Hutter 2019); moments are rounded to 8 bits after each step."""

    def __init__(self, params: Any, **keys: Any) -> None:
        super().__init__(params, keys)
        self._mean = Moment8bit("exp_avg", signed=True)
        self._square = Moment8bit("exp_avg_sq", signed=False)
        # The parameter that is stepped, in float32 with what it had lost.
        self._whole = torch.empty(0)

    def taken(self, parameter: torch.nn.Parameter) -> tuple[torch.Tensor, torch.Tensor]:
        """The weight with what it has lost so far."""
        state = self.state[parameter]
        if not is_short(parameter):
            return parameter.detach(), parameter.grad
        if COMPENSATION not in state:
            state[COMPENSATION] = torch.zeros_like(parameter, requires_grad=False)
        self._whole = parameter.detach().float().add_(state[COMPENSATION])
        return self._whole, parameter.grad.float()

    def give(self, parameter: torch.nn.Parameter) -> None:
        if is_short(parameter):
            parameter.detach().copy_(self._whole)
            self.state[parameter][COMPENSATION].copy_(self._whole.sub_(parameter.detach()))

    def move(self, weight: torch.Tensor, gradient: torch.Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        state["step"] = step = state.get("step", 0) + 1
        (beta1, beta2), eps, rate = group["betas"], group["eps"], group["lr"]
        mean = self._mean.read(state, weight).lerp_(gradient, 1 - beta1)
        square = self._square.read(state, weight).mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        unbiased = square / (1 - beta2**step)
        if group["stabilize"]:
            rate = shortened(rate, gradient, unbiased, eps)
        weight.mul_(1 - rate * group["weight_decay"])
        weight.sub_(mean / (1 - beta1**step) / unbiased.sqrt_().add_(eps) * rate)
        self._mean.write(state, mean)
        self._square.write(state, square)


def shortened(rate: float, gradient: torch.Tensor, square: torch.Tensor, eps: float) -> torch.Tensor:
    """A learning rate, divided by how far squares of a gradient are beyond their running means on average, where they
    are (StableAdamW, Wortsman et al. 2023, "Stable and low-precision training", algorithm 2)."""
    beyond = gradient.square().div_(square.clamp(min=eps**2)).mean().sqrt_()
    return rate / beyond.clamp_(min=1)


def _retyped(parameter: torch.Tensor, value: torch.Tensor, state: State) -> State:
    """Moments do not depend on the type; what a 16-bit weight lacks of the value is kept beside it."""
    moments = {key: kept for key, kept in state.items() if key != COMPENSATION}
    if not is_short(parameter):
        return moments
    return {**moments, COMPENSATION: (value.double() - parameter.detach().double()).to(parameter.dtype)}


def _state_bytes(settings: AdamW8bitKahanSettings, parameter: torch.Tensor) -> int:
    return eight_bit_bytes(2, settings, parameter) + is_short(parameter) * parameter.nbytes


KINDS = (
    OptimizerKind(
        AdamW8bitKahanSettings,
        AdamW8bitKahan,
        _state_bytes,
        not_on={},
        retyped=_retyped,
        float32_gradients=True,
        library="ours, with codes of bitsandbytes",
    ),
)
