"""PEFT's LoRA layers, corrected: they multiply in the type of their input, and in few operations.

PEFT 0.21 copies the input into the type of the factors. With float32 factors on a bfloat16 model that is a float32 copy
of every adapted layer's input, kept for the backward pass, and products without tensor cores: of Flux at 1024 x 1024
18 GiB of 74. Here the factors stay float32, where the optimizer updates them, and are rounded when used, as the
weights of mixed precision are (Micikevicius et al. 2018, section 3.1).

A LoRA has ten small operations for each large one of its layer, more than a processor can ask of a fast GPU in the
time. Therefore a frozen Linear and its update are one function with a backward pass of its own, in which sums are part
of products, and the scale is part of a factor.

Shapes: T tokens, I inputs, O outputs, R rank.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import Conv2d, Linear
from torch import nn
from torch.nn import functional

from utils.adapters.kinds import ADAPTER
from utils.quantised.linear import frozen_weight, whole_weight


class LoraLinear(Linear):
    """A Linear and its update."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        base, scale = self.base_layer, self.scaling[ADAPTER]
        plain = scale != 0 and not args and not kwargs and isinstance(self.lora_dropout[ADAPTER], nn.Identity)
        weight = frozen_weight(base) if plain else None
        if weight is None:
            return _adapted(self, base(x, *args, **kwargs), x)
        form, kept = weight
        down, up = self.lora_A[ADAPTER].weight, self.lora_B[ADAPTER].weight
        return _LinearWithUpdate.apply(x, down, up, scale, base.bias, form, *kept)


class LoraConv2d(Conv2d):
    """A convolution and its update."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return _adapted(self, self.base_layer(x, *args, **kwargs), x)


LAYERS = {nn.Linear: LoraLinear, nn.Conv2d: LoraConv2d}


class _LinearWithUpdate(torch.autograd.Function):
    """x @ weight.T + bias + x @ down.T @ (scale * up).T, of which `x`, `down` and `up` get gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        down_RI: torch.Tensor,
        up_OR: torch.Tensor,
        scale: float,
        bias: torch.Tensor | None,
        form: Any,
        *kept: torch.Tensor,
    ) -> torch.Tensor:
        output = functional.linear(x, whole_weight(form, kept, x.dtype), bias)
        down, up = down_RI.to(x.dtype), (up_OR if scale == 1 else up_OR * scale).to(x.dtype)
        inner_TR = x.reshape(-1, x.shape[-1]) @ down.T
        output.view(-1, output.shape[-1]).addmm_(inner_TR, up.T)
        ctx.save_for_backward(x, inner_TR, down, up, *kept)
        ctx.form, ctx.scale, ctx.factors = form, scale, down_RI.dtype
        return output

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, inner_TR, down, up, *kept = ctx.saved_tensors
        gradient_TO = gradient.reshape(-1, gradient.shape[-1])
        inner_gradient_TR = gradient_TO @ up
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = gradient_TO @ whole_weight(ctx.form, kept, x.dtype)
            of_x = of_x.addmm_(inner_gradient_TR, down).view(x.shape)
        of_down = _product(inner_gradient_TR.T, x.reshape(-1, x.shape[-1]), ctx.factors)
        of_up = _product(gradient_TO.T, inner_TR, ctx.factors)
        of_up = of_up if ctx.scale == 1 else of_up * ctx.scale
        return of_x, of_down, of_up, None, None, None, *([None] * len(kept))


def _product(left: torch.Tensor, right: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Their matrix product in this type; where it can be had, of sums that were not rounded to theirs before."""
    if dtype == torch.float32 and left.is_cuda and left.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(left, right, out_dtype=dtype)
    return (left @ right).to(dtype)


def _adapted(layer: Linear | Conv2d, result: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    scale = layer.scaling[ADAPTER]
    if scale == 0:
        return result
    down, up = layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]
    update = _in_its_type(up, _in_its_type(down, layer.lora_dropout[ADAPTER](x)))
    return result + (update * scale).to(result.dtype)


def _in_its_type(factor: nn.Linear | nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    weight = factor.weight.to(x.dtype)
    if isinstance(factor, nn.Conv2d):
        return functional.conv2d(x, weight, None, factor.stride, factor.padding, factor.dilation, factor.groups)
    return functional.linear(x, weight)
