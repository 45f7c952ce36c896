"""A quantised Linear is the plain Linear with the weight that its codes mean, and keeps nothing but the codes."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from utils.diffusion.seeds import normal
from utils.quantised.formats import FORMATS
from utils.quantised.linear import QuantisedLinear, parameter_count, quantise

NAMES = ("float8", "float8_e5m2", "int8", "nf4", "int4")
INPUTS, OUTPUTS = 96, 40


def plain(dtype: torch.dtype = torch.float32, *, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(INPUTS, OUTPUTS, bias=bias).to(dtype).requires_grad_(False)


def quantised(name: str, dtype: torch.dtype = torch.float32, *, bias: bool = True) -> QuantisedLinear:
    linear = plain(dtype, bias=bias)
    made = QuantisedLinear(linear, FORMATS[name])
    made.fill(linear.weight)
    return made


def with_dequantised_weight(made: QuantisedLinear, dtype: torch.dtype) -> nn.Linear:
    reference = plain(dtype, bias=made.bias is not None)
    reference.weight.copy_(made.dequantised(dtype))
    return reference


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_it_is_the_plain_linear_of_its_weight(name: str, dtype: torch.dtype, bias: bool, recompute: bool) -> None:
    made = quantised(name, dtype, bias=bias)
    reference = with_dequantised_weight(made, dtype)
    assert not torch.equal(reference.weight, plain(dtype).weight)
    outcomes = []
    for module in (made, reference):
        x_BTI = normal((2, 7, INPUTS), 0, "x").to(dtype).requires_grad_()
        squared = nn.Sequential(module, nn.SiLU())
        y_BTO = checkpoint(squared, x_BTI, use_reentrant=False) if recompute else squared(x_BTI)
        y_BTO.backward(normal((2, 7, OUTPUTS), 0, "gradient").to(dtype))
        outcomes.append((y_BTO.detach(), x_BTI.grad))
    for ours, theirs in zip(*outcomes, strict=True):
        assert ours.dtype == dtype and torch.equal(ours, theirs)
    assert all(parameter.grad is None for parameter in made.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_nothing_but_the_codes_is_kept_for_the_backward_pass(name: str) -> None:
    made, kept = quantised(name), []
    x_BI = normal((3, INPUTS), 0, "x").requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        made(x_BI)
    assert {tensor.data_ptr() for tensor in kept} == {made.weight.data_ptr(), made.scale.data_ptr()}


@pytest.mark.parametrize("name", NAMES)
def test_it_follows_its_tensors_to_other_memory(name: str) -> None:
    """Whatever moves the weights of a block about finds all of them among its parameters and buffers; the codes are
    looked at anew in the backward pass."""
    made, x_BI = quantised(name), normal((3, INPUTS), 0, "x").requires_grad_()
    expected = torch.autograd.grad(made(x_BI).sum(), x_BI)[0]
    y_BO = made(x_BI)
    for tensor in (*made.parameters(), *made.buffers()):
        old, tensor.data = tensor.data, tensor.data.clone()
        old.zero_()
    assert torch.equal(made(x_BI), y_BO)
    assert torch.equal(torch.autograd.grad(y_BO.sum(), x_BI)[0], expected)


@pytest.mark.parametrize("name", NAMES)
def test_codes_and_scales_keep_their_types(name: str) -> None:
    made = quantised(name)
    before = {key: tensor.clone() for key, tensor in made.state_dict().items()}
    made.to(torch.bfloat16).to("meta").to_empty(device="cpu").half()
    made.load_state_dict(before)
    assert (made.weight.dtype, made.scale.dtype) == (torch.uint8, before["scale"].dtype)
    assert made.bias.dtype == torch.float16
    made = quantised(name).to(torch.bfloat16)
    assert torch.equal(made.weight, before["weight"]) and torch.equal(made.scale, before["scale"])


def test_only_the_named_linears_are_replaced_and_all_parameters_counted() -> None:
    module = nn.Sequential(nn.Linear(8, 6), nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 5, bias=False)))
    bias, parameters = module[0].bias, parameter_count(module)
    quantise(module, ["0", "1.1"], FORMATS["nf4"])
    assert [type(part) for part in (module[0], *module[1])] == [QuantisedLinear, nn.LayerNorm, QuantisedLinear]
    assert module[0].bias is bias and module[0].weight.is_meta and module[1][1].bias is None
    assert parameter_count(module) == parameters == 8 * 6 + 6 + 2 * 6 + 6 * 5


def test_a_filled_weight_is_still_the_same_parameter() -> None:
    made = QuantisedLinear(plain(), FORMATS["float8"])
    parameter = made.weight
    made.fill(plain().weight)
    assert made.weight is parameter and not parameter.is_meta and not parameter.requires_grad


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_a_gpu_computes_with_the_same_weight(name: str, dtype: torch.dtype) -> None:
    made = quantised(name, dtype)
    expected = made.dequantised(dtype)
    made.to("cuda")
    torch.testing.assert_close(made.dequantised(dtype).cpu(), expected)
    x_BI = normal((3, INPUTS), 0, "x").to("cuda", dtype).requires_grad_()
    made(x_BI).sum().backward()
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {"rtol": 1e-3, "atol": 1e-3}
    torch.testing.assert_close(x_BI.grad[0].cpu(), expected.sum(dim=0), **tolerance)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", NAMES)
def test_a_gpu_quantises_like_a_cpu(name: str) -> None:
    """A number in the very middle between two may go to either."""
    values, form = normal((64, 256), 0, "weights"), FORMATS[name]
    there, here = form.quantise(values.to("cuda")), form.quantise(values)
    torch.testing.assert_close(there.scale.cpu(), here.scale)
    assert (there.weight.cpu() != here.weight).float().mean() < 1e-3
