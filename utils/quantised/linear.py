"""Linears whose frozen weight is kept in a format of 8 or 4 bits, and their place in a module.

The weight is brought back to the type of the computation whenever it is used, forward and backward, and nothing of that
is kept: neither by the module nor for the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from utils.quantised.formats import Format

Form = tuple[Format, tuple[int, int]]
"""The format of a quantised weight, and its shape: outputs, inputs."""
Kept = tuple[torch.Tensor, ...]
"""A weight, or its codes and their scale."""


def frozen_weight(linear: nn.Module) -> tuple[Form | None, Kept] | None:
    """What is kept of a Linear's weight, in which form if it is quantised. None if it or its bias is trained, or the
    product may be another one: of other kinds of modules, and of those with hooks."""
    trained = any(parameter.requires_grad for parameter in linear.parameters(recurse=False))
    if trained or linear._forward_hooks or linear._forward_pre_hooks:
        return None
    if type(linear) is QuantisedLinear:
        return (linear.form, linear.shape), (linear.weight, linear.scale)
    return (None, (linear.weight,)) if type(linear) is nn.Linear else None


def whole_weight(form: Form | None, kept: Kept, dtype: torch.dtype) -> torch.Tensor:
    """The weight (outputs, inputs) of which this is kept; what is quantised is brought to this type."""
    if form is None:
        return kept[0]
    return form[0].dequantise(*kept, form[1], dtype)


class _Product(torch.autograd.Function):
    """x @ weight.T + bias, of which the backward pass needs the codes alone. Only `x` gets a gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        bias: torch.Tensor | None,
        form: Form,
        *kept: torch.Tensor,
    ) -> torch.Tensor:
        ctx.form = form
        ctx.save_for_backward(*kept)
        return functional.linear(x, whole_weight(form, kept, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return gradient @ whole_weight(ctx.form, ctx.saved_tensors, gradient.dtype), None, None, None, None


class QuantisedLinear(nn.Linear):
    """A Linear whose weight is kept in a format, in place of a plain one, whose bias it takes over.

    Its weight is on the meta device until `fill`. All that it keeps is registered: `weight` has the codes, the buffer
    `scale` their factors. Both keep their types through `.to(dtype)`.

    Args:
        plain: the Linear whose place it takes.
        form: the format of the weight.

    Attributes:
        dtype: the type of the weight before, in which what is put beside it is kept.
    """

    def __init__(self, plain: nn.Linear, form: Format):
        super().__init__(plain.in_features, plain.out_features, bias=False, device="meta")
        codes = form.empty(self.shape)
        self.form = form
        self.dtype = plain.weight.dtype
        self.weight = nn.Parameter(codes.weight, requires_grad=False)
        self.bias = plain.bias
        self.register_buffer("scale", codes.scale)

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of the weight that the codes mean: outputs, inputs."""
        return self.out_features, self.in_features

    def fill(self, values_OI: torch.Tensor) -> None:
        """Gives the weight its values, of any floating-point type. They are quantised on this process's GPU if there is
        one, and kept on their own device."""
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else values_OI.device
        codes = self.form.quantise(values_OI.detach().to(device).float())
        weight, self.scale = (part.to(values_OI.device) for part in codes)
        # The parameter keeps its identity, so that whoever holds it already holds the values too.
        torch.utils.swap_tensors(self.weight, nn.Parameter(weight, requires_grad=False))

    def dequantised(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight (outputs, inputs) that the codes mean."""
        return self.form.dequantise(self.weight, self.scale, self.shape, dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not (torch.is_grad_enabled() and x.requires_grad):
            # The same; torch.compile cannot read a Function that nothing goes back through.
            return functional.linear(x, self.dequantised(x.dtype), self.bias)
        kept = (self.form, self.shape), self.weight, self.scale
        if self.bias is not None and self.bias.requires_grad:
            return _Product.apply(x, None, *kept) + self.bias
        return _Product.apply(x, self.bias, *kept)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> QuantisedLinear:
        def move(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            # Not through the other type and back: that would round the scale.
            return tensor.to(moved.device) if tensor is self.scale and moved.dtype != tensor.dtype else moved

        return super()._apply(move, recurse)


def quantise(module: nn.Module, names: Iterable[str], form: Format) -> None:
    """Puts quantised Linears, still without values, in the places of these plain ones."""
    for name in names:
        parent, _, own = name.rpartition(".")
        setattr(module.get_submodule(parent), own, QuantisedLinear(module.get_submodule(name), form))


def parameter_count(module: nn.Module) -> int:
    """The number of parameters of a module, by what the codes mean and not by their bytes."""
    linears = [part for part in module.modules() if isinstance(part, QuantisedLinear)]
    coded = {id(linear.weight): linear.out_features * linear.in_features for linear in linears}
    return sum(coded.get(id(parameter), parameter.numel()) for parameter in module.parameters())
