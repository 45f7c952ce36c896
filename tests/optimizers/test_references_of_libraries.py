"""Ten steps of further optimizers that libraries have: equal to the library's own run, to the bit."""

from __future__ import annotations

from typing import Any

import bitsandbytes
import prodigyplus
import pytest
import pytorch_optimizer
import torch
from torch import nn

import optimizers
from optimizers.parameter_groups import groups_of
from tests.optimizers.test_references import ADAM, Make, Named, ours, problem, theirs, walk

pytestmark = pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")


@pytest.mark.parametrize(
    "keys",
    [
        {"betas": (0.8, 0.9), "shampoo_beta": 0.85, "eps": 1e-6, "precondition_frequency": 3},
        {"betas": (0.95, 0.95), "precondition_1d": True, "max_precondition_dim": 4},
    ],
)
def test_soap_is_the_librarys(keys: dict[str, Any]) -> None:
    expected, found = theirs(pytorch_optimizer.SOAP, **keys), ours("soap", **keys)
    for key, weight in expected.items():
        assert torch.equal(found[key], weight) and not torch.allclose(weight, problem()[key], atol=1e-2), key


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"factored": False, "use_speed": True},
        {"use_schedulefree": False, "d_limiter": False},
        {"use_focus": True, "factored": False},
    ],
)
def test_prodigy_without_a_schedule_is_the_librarys(keys: dict[str, Any]) -> None:
    """With one distance for all, which our sums over processes have for one process too."""
    keys = {"d0": 1e-3, "betas": (0.8, 0.9), "d_coef": 0.7, **keys}
    expected = theirs(prodigyplus.ProdigyPlusScheduleFree, lr=1.0, split_groups=False, **keys)
    found = ours("prodigy_plus_schedule_free", lr=1.0, **keys)
    for key, weight in expected.items():
        assert torch.equal(found[key], weight) and not torch.allclose(weight, problem()[key], atol=1e-3), key


def in_eight_bits(make: Make, **keys: Any) -> Named:
    """Weights of which some are so many that their state is in 8 bits, after ten steps."""
    draw = torch.Generator().manual_seed(0)
    shapes = {"large": (70, 100), "small": (6, 4), "vector": (5,)}
    named = {name: nn.Parameter(torch.randn(shape, generator=draw)) for name, shape in shapes.items()}
    optimizer = make(groups_of(named.items(), lr=0.05, weight_decay=0.1), **keys)
    walk(named, optimizer)
    kept = {tensor.dtype for tensor in optimizer.state[named["large"]].values() if isinstance(tensor, torch.Tensor)}
    assert torch.uint8 in kept
    return {key: weight.detach() for key, weight in named.items()}


BYTES = {
    "adamw8bit": ("AdamW8bit", ADAM),
    "paged_adamw8bit": ("PagedAdamW8bit", ADAM),
    "lion8bit": ("Lion8bit", {"betas": (0.8, 0.9)}),
    "paged_lion8bit": ("PagedLion8bit", {"betas": (0.8, 0.9)}),
}


@pytest.mark.parametrize("name", BYTES)
def test_steps_in_eight_bits_are_bitsandbytes(name: str) -> None:
    """On the CPU, where they are not offered; without state in pages there."""
    stock, keys = BYTES[name]
    settings = optimizers.find(name).settings(type=name, lr=0.05, weight_decay=0.1, **keys)
    expected = in_eight_bits(getattr(bitsandbytes.optim, stock), lr=0.05, **keys)
    found = in_eight_bits(lambda groups: optimizers.made(groups, settings))
    other = in_eight_bits(getattr(bitsandbytes.optim, stock), lr=0.05)
    assert all(torch.equal(found[key], weight) for key, weight in expected.items())
    assert not torch.equal(other["large"], expected["large"])
