"""The load-balancing loss against the gate of diffusers and finite differences.

Shapes: T tokens, D width, E experts, K experts a token.
"""

from __future__ import annotations

import pytest
import torch
from diffusers.models.transformers.transformer_hidream_image import MoEGate

from utils.diffusion.auxiliary import load_balancing
from utils.diffusion.seeds import normal

EXPERTS, CHOSEN = 4, 2


def loss_of(weight_ED: torch.Tensor, hidden_TD: torch.Tensor) -> torch.Tensor:
    probabilities_TE = (hidden_TD @ weight_ED.T).softmax(-1)
    return load_balancing(probabilities_TE, probabilities_TE.topk(CHOSEN, dim=-1).indices)


def test_value_and_gradient_are_those_of_hidreams_gate() -> None:
    gate = MoEGate(8, EXPERTS, CHOSEN, aux_loss_alpha=1.0).train()
    hidden = normal((2, 25, 8), 0, "hidden")
    with torch.no_grad():
        gate.weight.copy_(normal((EXPERTS, 8), 0, "router"))
    chosen, _, expected = gate(hidden)
    probabilities = (hidden.view(-1, 8) @ gate.weight.T).softmax(-1)
    ours = load_balancing(probabilities, chosen)
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(torch.autograd.grad(ours, gate.weight)[0], torch.autograd.grad(expected, gate.weight)[0])


def test_gradient_at_the_router_is_that_of_finite_differences() -> None:
    """So small a move changes no choice, of which the loss is not a smooth function."""
    weight, hidden = normal((EXPERTS, 6), 0, "router").double(), normal((40, 6), 0, "hidden").double()
    (gradient,) = torch.autograd.grad(loss_of(weight.requires_grad_(), hidden), weight)
    assert gradient.abs().max() > 1e-3
    for place in [(0, 0), (1, 3), (3, 5)]:
        move = torch.zeros_like(weight)
        move[place] = 1e-6
        numeric = (loss_of(weight + move, hidden) - loss_of(weight - move, hidden)) / 2e-6
        assert gradient[place].item() == pytest.approx(numeric.item(), rel=1e-5, abs=1e-9)


def test_is_one_in_balance_and_the_number_of_experts_at_worst() -> None:
    even = torch.full((8, EXPERTS), 1 / EXPERTS)
    each_expert = torch.arange(8).remainder(EXPERTS)[:, None]
    assert load_balancing(even, each_expert).item() == pytest.approx(1.0)
    one = torch.zeros(8, EXPERTS)
    one[:, 2] = 1.0
    assert load_balancing(one, torch.full((8, 1), 2)).item() == pytest.approx(EXPERTS)
