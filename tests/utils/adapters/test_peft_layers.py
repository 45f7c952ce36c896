"""A Linear with its LoRA as one function, against the formula in float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from utils.adapters.attach import attach, initialise
from utils.adapters.kinds import ADAPTER
from utils.adapters.lora import LoraSettings
from utils.adapters.peft_layers import LoraLinear
from utils.diffusion.seeds import normal
from utils.quantised.formats import FORMATS
from utils.quantised.linear import quantise

INPUTS, OUTPUTS, RANK = 24, 40, 4
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.02}
"""Relative to the largest number of a tensor."""


def adapted(
    dtype: torch.dtype, *, bias: bool = True, form: str | None = None, dropout: float = 0.0, alpha: float = RANK
) -> LoraLinear:
    model = nn.Module()
    model.blocks = nn.ModuleList([nn.ModuleDict({"linear": nn.Linear(INPUTS, OUTPUTS, bias=bias, dtype=dtype)})])
    linear = model.blocks[0]["linear"]
    with torch.no_grad():
        for number, parameter in enumerate(linear.parameters()):
            parameter.copy_(normal(tuple(parameter.shape), 0, number) * 0.2)
    if form:
        values = linear.weight.detach().clone()
        quantise(model, ["blocks.0.linear"], FORMATS[form])
        model.blocks[0]["linear"].fill(values)
    settings = LoraSettings(type="lora", rank=RANK, alpha=alpha, dropout=dropout)
    attach(model, ["blocks"], settings)
    initialise(model, [model], settings, seed=0)
    layer = model.blocks[0]["linear"]
    with torch.no_grad():
        layer.lora_B[ADAPTER].weight.copy_(normal((OUTPUTS, RANK), 0, "up"))
    return layer


def reference(layer: LoraLinear, x: torch.Tensor) -> list[torch.Tensor]:
    """Output and gradients of x, down and up in float64."""
    base = layer.base_layer
    weight = (base.dequantised(x.dtype) if hasattr(base, "dequantised") else base.weight).detach().double()
    down, up = (part[ADAPTER].weight.detach().double().requires_grad_() for part in (layer.lora_A, layer.lora_B))
    x = x.detach().double().requires_grad_()
    y = x @ weight.T + (0 if base.bias is None else base.bias.double()) + layer.scaling[ADAPTER] * x @ down.T @ up.T
    y.square().sum().backward()
    return [y.detach(), x.grad, down.grad, up.grad]


def found(layer: LoraLinear, x: torch.Tensor) -> list[torch.Tensor]:
    x = x.detach().requires_grad_()
    y = layer(x)
    y.square().sum().backward()
    return [y.detach(), x.grad, layer.lora_A[ADAPTER].weight.grad, layer.lora_B[ADAPTER].weight.grad]


def check(layer: LoraLinear, x: torch.Tensor) -> None:
    for ours, expected in zip(found(layer, x), reference(layer, x), strict=True):
        assert (ours.double() - expected).abs().max() <= TOLERANCE[x.dtype] * expected.abs().max()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    "keys", [{}, {"bias": False}, {"alpha": 1.0}, {"form": "int8"}, {"form": "nf4", "alpha": 3.0}, {"form": "int4"}]
)
def test_it_is_the_formula(dtype: torch.dtype, keys: dict) -> None:
    layer = adapted(dtype, **keys)
    check(layer, normal((2, 3, INPUTS), 0, "x").to(dtype))
    gradients = found(layer, normal((5, INPUTS), 0, "x").to(dtype))
    assert [gradient.dtype for gradient in gradients] == [dtype, dtype, torch.float32, torch.float32]


def test_inputs_may_lie_in_any_order() -> None:
    check(adapted(torch.float32), normal((INPUTS, 3, 2), 0, "x").permute(2, 1, 0))


def test_an_input_without_a_gradient_gets_none_and_the_factors_theirs() -> None:
    layer, x = adapted(torch.float32), normal((3, INPUTS), 0, "x")
    layer(x).square().sum().backward()
    expected = reference(layer, x)[2].float()
    torch.testing.assert_close(layer.lora_A[ADAPTER].weight.grad, expected, rtol=1e-4, atol=1e-4)


def test_dropout_and_hooks_are_heeded() -> None:
    x = normal((3, INPUTS), 0, "x")
    dropping = adapted(torch.float32, dropout=0.5)
    torch.manual_seed(0)
    first, second = dropping(x), dropping(x)
    assert not torch.equal(first, second)
    torch.testing.assert_close(dropping.eval()(x), adapted(torch.float32)(x))
    hooked = adapted(torch.float32)
    plain = hooked(x)
    hooked.base_layer.register_forward_hook(lambda module, inputs, output: output + 1)
    torch.testing.assert_close(hooked(x), plain + 1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gradients_of_factors_are_summed_in_float32_on_a_gpu() -> None:
    layer, x = adapted(torch.bfloat16).cuda(), normal((4096, INPUTS), 0, "x").bfloat16().cuda()
    check(layer, x)
    gradient = found(layer, x)[2]
    assert not torch.equal(gradient, gradient.bfloat16().float())
