"""Losses that layers add on their way: a router's balance, whose gradient reaches it from the last stage.

Shapes: B batch, T tokens, D width, E experts, K terms.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

from tests.processes import run_ranks
from utils.diffusion.auxiliary import Output, load_balancing
from utils.diffusion.losses import Labels, Loss
from utils.diffusion.seeds import normal
from utils.parallel.pipeline import DenoiserPipeline
from utils.ranks import Ranks

TOKENS, WIDTH, EXPERTS, CHOSEN = 6, 4, 3, 2
WEIGHT = 0.3
TERMS = ("balance", "size")
ACCUMULATION = 2
LEARNING_RATE = 1e-3
NUDGE = 1e-3


class Stream(NamedTuple):
    x_BTD: torch.Tensor
    terms_K: torch.Tensor


class Mixture(nn.Module):
    """Experts of which each token goes to some; adds its balance, and the size of what it gives."""

    def __init__(self, number: int):
        super().__init__()
        self.router_ED = nn.Parameter(normal((EXPERTS, WIDTH), number, "router"))
        self.experts_EDD = nn.Parameter(normal((EXPERTS, WIDTH, WIDTH), number, "experts"))

    def forward(self, stream: Stream) -> Stream:
        x_BTD = stream.x_BTD
        probabilities_BTE = (x_BTD @ self.router_ED.T).softmax(-1)
        weights_BTK, chosen_BTK = probabilities_BTE.topk(CHOSEN, dim=-1)
        made_BTED = torch.einsum("btd,edf->btef", x_BTD, self.experts_EDD)
        taken_BTKD = made_BTED.gather(2, chosen_BTK.unsqueeze(-1).expand(-1, -1, -1, WIDTH))
        result_BTD = (weights_BTK.unsqueeze(-1) * taken_BTKD).sum(2)
        balance = load_balancing(probabilities_BTE.flatten(0, 1), chosen_BTK.flatten(0, 1))
        added_K = torch.stack([WEIGHT * balance, 0.01 * result_BTD.square().mean()])
        return Stream(x_BTD + result_BTD, stream.terms_K + added_K)


class Begin(nn.Module):
    def forward(self, inputs: tuple) -> Stream:
        return Stream(inputs[0], torch.zeros(len(TERMS)))


class End(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([0.7]))

    def forward(self, stream: Stream) -> Output:
        return Output(stream.x_BTD * self.scale, stream.terms_K)


def layers() -> list[nn.Module]:
    return [Begin(), Mixture(1), Mixture(2), End()]


def micro_batches() -> list[tuple[tuple, Labels]]:
    return [
        (
            (normal((2, TOKENS, WIDTH), number, "x"),),
            Labels(normal((2, TOKENS, WIDTH), number, "y"), torch.ones(2, 1, 1)),
        )
        for number in range(ACCUMULATION)
    ]


def train(ranks: Ranks, stages: int) -> tuple[dict[str, np.ndarray], float, dict[str, float], float]:
    """Job of a rank: the gradients of its stage, loss and terms of a step, and the loss of an evaluation."""
    from utils.parallel.backend import initialize_deepspeed
    from utils.parallel.engine import Engine

    initialize_deepspeed()
    bounds = [(0, 4)] if stages == 1 else [(0, 2), (2, 4)]
    module = DenoiserPipeline(layers(), bounds, Stream, Loss("mse"), loss_terms=TERMS)
    parameters = dict(module.named_parameters())
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    optimizer = torch.optim.SGD([{"params": list(parameters.values()), "initial_lr": 1.0}], lr=LEARNING_RATE)
    engine = Engine(module, optimizer, accumulation=ACCUMULATION, clip_norm=0.0)
    losses = engine.evaluate(micro_batches(), ACCUMULATION)
    result = engine.train_step(micro_batches(), 0)
    moved = {name: (before[name] - p.detach()) / LEARNING_RATE for name, p in parameters.items()}
    # Tensors would be shared with a process that has ended.
    moved = {name: move.numpy() for name, move in moved.items()}
    return moved, result.loss, dict(result.terms), torch.cat(losses).mean().item()


@torch.no_grad()
def whole(nudged: tuple[str, tuple[int, ...], float] | None = None) -> tuple[float, list[float]]:
    """Loss and terms of a step in float64, one parameter's entry moved."""
    chain = nn.Sequential(*layers()).double()
    if nudged:
        name, place, by = nudged
        dict(chain.named_parameters())[name][place] += by
    loss, terms = 0.0, torch.zeros(len(TERMS), dtype=torch.float64)
    for inputs, labels in micro_batches():
        prediction, terms_K = chain((inputs[0].double(),))
        loss += (prediction - labels.target).square().mean().item() / ACCUMULATION
        terms += terms_K / ACCUMULATION
    return loss, terms.tolist()


@pytest.mark.parametrize("stages", [1, 2])
def test_a_router_gets_the_gradient_of_its_balance(stages: int) -> None:
    returned = run_ranks(train, stages, stages)
    expected_loss, expected_terms = whole()
    assert expected_terms[0] > WEIGHT
    gradients: dict[str, np.ndarray] = {}
    for own, loss, terms, evaluated in returned:
        gradients |= own
        assert loss == pytest.approx(expected_loss, rel=1e-5)
        assert list(terms.values()) == pytest.approx(expected_terms, rel=1e-5) and tuple(terms) == TERMS
        # Evaluation has the loss of the prediction alone.
        assert evaluated == pytest.approx(expected_loss, rel=1e-5)
    names = [name for name, _ in nn.Sequential(*layers()).named_parameters()]
    routers = [name for name in names if "router" in name]
    assert sorted(gradients) == sorted(names) and len(routers) == 2
    for name in routers:
        gradient = gradients[name]
        for place in [(0, 0), (1, 2), (2, 3)]:
            ends = [whole((name, place, sign * NUDGE)) for sign in (1, -1)]
            slope = (sum([ends[0][0], *ends[0][1]]) - sum([ends[1][0], *ends[1][1]])) / (2 * NUDGE)
            assert gradient[place].item() == pytest.approx(slope, rel=2e-2, abs=2e-4)
            alone = (ends[0][0] - ends[1][0]) / (2 * NUDGE)
            assert abs(slope - alone) > 1e-3, "the balance's share of it can be seen"
