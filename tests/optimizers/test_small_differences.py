"""What becomes of differences in the last bits of gradients, such as sums in another order make."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import optimizers
from tests.optimizers.test_kinds import CASES

pytestmark = pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
SIDE, FEW, STEPS = 32, 2, 4
SUBSPACE = {"momentum_type": "subspace", "second_moment_type": "none", "rank": 8, "proj_type": "svd"}
"""Of more dimensions than the gradients of `FEW` directions have."""


def difference(name: str, keys: dict[str, Any], directions: int) -> float:
    """How far two runs are apart, as a part of the way that one has gone, whose gradients differ by rounding and have
    so many directions each."""
    start, plain = stepped(name, keys, directions, noise=0.0)
    _, rounded = stepped(name, keys, directions, noise=1e-7)
    return float((rounded - plain).norm() / (plain - start).norm())


def stepped(name: str, keys: dict[str, Any], directions: int, noise: float) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix before and after some steps."""
    draw = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.randn(SIDE, SIDE, generator=draw))
    start = weight.detach().clone()
    optimizer = optimizers.made([{"params": [weight]}], optimizers.find(name).settings(type=name, lr=1e-2, **keys))
    for _ in range(STEPS):
        gradient = torch.randn(SIDE, directions, generator=draw) @ torch.randn(directions, SIDE, generator=draw)
        weight.grad = gradient * (1 + noise * torch.randn(SIDE, SIDE, generator=draw))
        optimizer.step()
    return start, weight.detach()


@pytest.mark.parametrize(("name", "keys"), [case for case in CASES if case[0] != "soap"])
def test_steps_differ_as_little_as_their_gradients(name: str, keys: dict[str, Any]) -> None:
    assert difference(name, keys, FEW) < 1e-5


@pytest.mark.parametrize(("name", "keys"), [("soap", {}), ("genericoptim", SUBSPACE)])
def test_directions_that_no_gradient_has_are_chosen_by_rounding(name: str, keys: dict[str, Any]) -> None:
    """As the page of optimizers says: decompositions give some for them too, and the next gradients go there."""
    assert difference(name, keys, FEW) > 0.1
    assert difference(name, keys, SIDE) < 1e-2
