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

from typing import Any, NamedTuple

import torch
from peft.tuners.lora import Conv2d, Linear
from torch import nn
from torch.nn import functional

from utils.adapters.base_weight import row_lengths, shape_of, weight_of
from utils.adapters.dropping import keeps
from utils.adapters.kinds import ADAPTER
from utils.adapters.lora_starts import start_of
from utils.quantised.linear import frozen_weight, whole_weight

STARTS = ("lora_start_A", "lora_start_B")
"""The names of what a start takes out of the weight."""


class Drawn(NamedTuple):
    """What a training step draws for each module.

    Attributes:
        ranks: the share of ranks that a sample does without.
        module: the share of steps in which the module does without its update.
        unit: the update has the first `unit`, or 2 `unit`, ... ranks; None for all of them.
        root: whether the scale is divided by the root of the rank instead of the rank.
    """

    ranks: float = 0.0
    module: float = 0.0
    unit: int | None = None
    root: bool = False

    @property
    def anything(self) -> bool:
        """Whether something is drawn."""
        return bool(self.ranks or self.module or self.unit)


class _Drawing:
    """What a layer of LoRA has beside PEFT's: what it draws in a training step, and how it starts."""

    drawn, start = Drawn(), None

    @property
    def draws_random_numbers(self) -> bool:
        """Whether a training step does, beside `dropout`."""
        return self.drawn.anything


class LoraLinear(_Drawing, Linear):
    """A Linear and its update."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        base, scale = self.base_layer, self.scaling[ADAPTER]
        plain = scale != 0 and not args and not kwargs and isinstance(self.lora_dropout[ADAPTER], nn.Identity)
        plain = plain and not self.lora_magnitude_vector and not (self.training and self.drawn.anything)
        weight = frozen_weight(base) if plain else None
        if weight is None:
            return _adapted(self, base(x, *args, **kwargs), x)
        form, kept = weight
        down, up = factors_of(self)
        return _LinearWithUpdate.apply(x, down, up, scale, base.bias, form, *kept)


class LoraConv2d(_Drawing, Conv2d):
    """A convolution and its update."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return _adapted(self, self.base_layer(x, *args, **kwargs), x)


LAYERS = {nn.Linear: LoraLinear, nn.Conv2d: LoraConv2d}


class Magnitude(nn.Module):
    """The lengths of a weight's rows, which DoRA trains: (O) for a Linear, (1, O, 1, 1) for a convolution."""

    def __init__(self, base: nn.Module):
        super().__init__()
        outputs, *others = shape_of(base)
        shape = (outputs,) if len(others) == 1 else (1, outputs, *[1] * (len(others) - 1))
        self.weight = nn.Parameter(torch.empty(shape, device="meta"))


def put_start(layer: LoraLinear | LoraConv2d, dtype: torch.dtype) -> None:
    """Makes room for what a start takes out of the weight (`lora_starts.py`)."""
    for part, factor in zip(STARTS, (layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]), strict=True):
        empty = torch.empty(factor.weight.shape, dtype=dtype, device="meta")
        layer.register_buffer(part, empty, persistent=False)
    layer.start_at_home = tuple(map(layer.get_buffer, STARTS))


@torch.no_grad()
def set_start(layer: LoraLinear | LoraConv2d, dtype: torch.dtype) -> None:
    """Gives a layer's factors, and what is taken out of its weight, their first values, the same for both."""
    factors = layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]
    given = start_of(layer.base_layer, layer.r[ADAPTER], layer.scaling[ADAPTER], layer.start)
    for part, factor, values in zip(STARTS, factors, given, strict=True):
        factor.weight.copy_(values)
        layer.register_buffer(part, values.to(dtype), persistent=False)
    # For exports: the buffers of a swapped block are not at hand between steps.
    layer.start_at_home = tuple(layer.get_buffer(part).clone() for part in STARTS)


@torch.no_grad()
def set_lengths(layer: LoraLinear | LoraConv2d) -> None:
    """Lets the trained lengths of rows be those that they have."""
    weight = weight_of(layer.base_layer)
    down, up = (factor.to(weight.device) for factor in factors_of(layer))
    lengths_O = row_lengths(weight, down, up, layer.scaling[ADAPTER]).cpu()
    trained = layer.lora_magnitude_vector[ADAPTER]
    trained.weight = nn.Parameter(lengths_O.view(trained.weight.shape))


def factors_of(layer: LoraLinear | LoraConv2d) -> tuple[torch.Tensor, torch.Tensor]:
    """Both factors of the whole update, which beside a start are those of a sum."""
    down, up = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
    if layer.start is None:
        return down, up
    start_down, start_up = map(layer.get_buffer, STARTS)
    return torch.cat([down, start_down.to(down.dtype)]), torch.cat([up, -start_up.to(up.dtype)], dim=1)


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


def _adapted(layer: LoraLinear | LoraConv2d, result: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    scale = layer.scaling[ADAPTER]
    if scale == 0:
        return result
    down, up = factors_of(layer)
    drawn = layer.drawn if layer.training else Drawn()
    inner = _through(layer.lora_A[ADAPTER], down, layer.lora_dropout[ADAPTER](x))
    if drawn.ranks or drawn.unit:
        inner = inner * _kept_ranks(inner, drawn, is_convolution=isinstance(layer, Conv2d))
    update = (_through(layer.lora_B[ADAPTER], up, inner) * scale).to(result.dtype)
    if layer.lora_magnitude_vector:
        update = _with_lengths(layer, result, update, down, up)
    return result + (update * keeps(drawn.module, x) if drawn.module else update)


def _through(factor: nn.Linear | nn.Conv2d, weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """`x` through a factor, in its own type."""
    weight = weight.to(x.dtype)
    if isinstance(factor, nn.Conv2d):
        return functional.conv2d(x, weight, None, factor.stride, factor.padding, factor.dilation, factor.groups)
    return functional.linear(x, weight)


def _with_lengths(
    layer: LoraLinear | LoraConv2d, result: torch.Tensor, update: torch.Tensor, down: torch.Tensor, up: torch.Tensor
) -> torch.Tensor:
    """What is added to the base's `result`, so that the rows of the weight have the trained lengths. Their lengths with
    the update are constants of the backward pass (Liu et al. 2024, section 4.3)."""
    lengths_O = row_lengths(weight_of(layer.base_layer), down, up, layer.scaling[ADAPTER])
    shape = (-1, 1, 1) if isinstance(layer, Conv2d) else (-1,)
    ratio = (layer.lora_magnitude_vector[ADAPTER].weight.flatten() / lengths_O).view(shape)
    bias = layer.base_layer.bias
    product = result if bias is None else result - bias.view(shape).to(result.dtype)
    # As a change of the result, so that it is the same, bit for bit, where nothing has been trained.
    return update + (product + update) * (ratio - 1).to(result.dtype)


def _kept_ranks(inner: torch.Tensor, drawn: Drawn, *, is_convolution: bool) -> torch.Tensor:
    """0 for what of the ranks is left out, and what makes up for it elsewhere; for each sample (B, ..., R), or
    (B, R, 1, 1) of convolutions."""
    samples, rank = len(inner), inner.shape[1 if is_convolution else -1]
    factor = torch.ones((samples, rank), dtype=inner.dtype, device=inner.device)
    if drawn.ranks:
        factor = (torch.rand_like(factor, dtype=torch.float32) >= drawn.ranks).to(factor.dtype) / (1 - drawn.ranks)
    if drawn.unit:
        units = -(-rank // drawn.unit)
        used = (torch.randint(1, units + 1, (), device=inner.device) * drawn.unit).clamp(max=rank)
        strength = rank / used
        scale = strength.sqrt() if drawn.root else strength
        factor = factor * (torch.arange(rank, device=inner.device) < used) * scale.to(factor.dtype)
    if is_convolution:
        return factor[:, :, None, None]
    return factor.view(samples, *[1] * (inner.ndim - 2), rank)
