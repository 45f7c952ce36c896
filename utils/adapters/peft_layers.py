"""PEFT's LoRA layers, corrected: they multiply in the type of their input.

PEFT 0.21 copies the input into the type of the factors. With float32 factors on a bfloat16 model that is a float32 copy
of every adapted layer's input, kept for the backward pass, and products without tensor cores: of Flux at 1024 x 1024
18 GiB of 74. Here the factors stay float32, where the optimizer updates them, and are rounded when used, as the
weights of mixed precision are (Micikevicius et al. 2018, section 3.1).
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import Conv2d, Linear
from torch import nn
from torch.nn import functional

from utils.adapters.kinds import ADAPTER


class LoraLinear(Linear):
    """A Linear and its update."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return _adapted(self, self.base_layer(x, *args, **kwargs), x)


class LoraConv2d(Conv2d):
    """A convolution and its update."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return _adapted(self, self.base_layer(x, *args, **kwargs), x)


LAYERS = {nn.Linear: LoraLinear, nn.Conv2d: LoraConv2d}


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
