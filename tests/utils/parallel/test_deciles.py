"""What a step tells of its samples' losses by noise level."""

from __future__ import annotations

import math

import pytest
import torch

from utils.parallel.deciles import LossByDecile, means


def test_losses_are_averaged_in_their_tenth() -> None:
    losses = LossByDecile(torch.device("cpu"))
    losses.add(torch.tensor([1.0, 3.0, 5.0]), torch.tensor([0.0, 0.0999, 0.1]))
    losses.add(torch.tensor([2.0, 8.0]), torch.tensor([0.05, 1.0]))
    assert means(losses.sums_2D.flatten().tolist()) == {0.05: 2.0, 0.15: 5.0, 0.95: 8.0}


def test_a_loss_that_is_no_number_spoils_no_other_tenth() -> None:
    losses = LossByDecile(torch.device("cpu"))
    losses.add(torch.tensor([math.nan, 3.0]), torch.tensor([0.3, 0.8]))
    found = means(losses.sums_2D.flatten().tolist())
    assert found[0.85] == 3.0 and math.isnan(found[0.35])
    assert means([0.0] * 20) == {}


@pytest.mark.parametrize("trained", [True, False])
def test_what_is_counted_is_no_part_of_the_graph(trained: bool) -> None:
    losses = LossByDecile(torch.device("cpu"))
    losses.add(torch.ones(2, requires_grad=trained) * 2, torch.tensor([0.5, 0.6]))
    assert not losses.sums_2D.requires_grad
