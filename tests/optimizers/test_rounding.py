"""What becomes of small steps of 16-bit weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from optimizers.adamw import AdamW
from optimizers.rounding import MASTER, Rounding, by_chance

STEPS, LR = 1000, 1e-5


def moved(rounding: Rounding | None, name: str = "weight") -> torch.Tensor:
    """Where 1,000 steps of 1e-5 lead weights of about 1, which are bfloat16, or float32 for None."""
    draw = torch.Generator().manual_seed(0)
    start = torch.randn(64, 64, generator=draw).bfloat16()
    weight = nn.Parameter(start.clone() if rounding else start.float())
    optimizer = AdamW([{"params": [weight], "names": [name]}], LR, (0.9, 0.99), 1e-8, 0.0, rounding or "master")
    direction = torch.randn(64, 64, generator=draw)
    for _ in range(STEPS):
        gradient = direction + 0.5 * torch.randn(64, 64, generator=draw)
        weight.grad = gradient.to(weight.dtype)
        optimizer.step()
    end = weight.detach().float()
    if rounding == "kahan":
        end = end + optimizer.state[weight]["compensation"].float()
    return (optimizer.state[weight][MASTER] if rounding == "master" else end) - start.float()


def test_small_steps_are_lost_by_the_nearest_number_alone() -> None:
    """The share of a movement that is missing in the mean over the weights, and by how much each misses it."""
    whole = moved(None)
    missing, apart = {}, {}
    for rounding in ("master", "kahan", "stochastic", "nearest"):
        found = moved(rounding)
        missing[rounding] = 1 - ((found * whole).sum() / whole.square().sum()).item()
        apart[rounding] = ((found - whole).norm() / whole.norm()).item()
    assert missing["nearest"] > 0.99
    assert abs(missing["stochastic"]) < 0.01 and 0.5 < apart["stochastic"] < 0.9, "right in the mean, and noisy"
    assert abs(missing["kahan"]) < 0.04 and apart["kahan"] < 0.2, "what is kept in 16 bits is rounded too"
    assert abs(missing["master"]) < 1e-5 and apart["master"] < 1e-4


def test_chance_is_right_in_the_mean_and_the_same_for_the_same_name() -> None:
    value = torch.full((20000,), 1.0 + 0.25 * 2**-7)
    rounded = by_chance(value, torch.Generator().manual_seed(0))
    assert set(rounded.tolist()) == {1.0, 1.0 + 2**-7}
    assert (rounded - 1).mean().item() == pytest.approx(0.25 * 2**-7, rel=0.05)
    assert (by_chance(-value, torch.Generator().manual_seed(0)) == -rounded).all()
    exact = torch.tensor([0.0, -1.5, 3e38]).bfloat16().float()
    assert torch.equal(by_chance(exact, torch.Generator().manual_seed(0)), exact)
    assert torch.equal(moved("stochastic"), moved("stochastic"))
    assert not torch.equal(moved("stochastic"), moved("stochastic", "another"))


@pytest.mark.parametrize("after", ["master", "kahan", "stochastic", "nearest"])
@pytest.mark.parametrize("before", ["master", "kahan", "stochastic", "nearest"])
def test_a_run_goes_on_with_another_way_of_rounding(before: Rounding, after: Rounding) -> None:
    """What is kept beside a weight is taken over as far as it goes."""
    weight = nn.Parameter(torch.linspace(-1, 1, 96).view(8, 12).bfloat16())
    gradient = torch.randn(8, 12, generator=torch.Generator().manual_seed(0)).bfloat16()
    first = AdamW([weight], 1e-4, (0.9, 0.99), 1e-8, 0.0, before)
    for _ in range(3):
        weight.grad = gradient
        first.step()
    state = first.state[weight]
    exact = weight.detach().float() + (state["compensation"].float() if before == "kahan" else 0.0)
    exact = state[MASTER].clone() if before == "master" else exact
    then = AdamW([weight], 0.0, (0.9, 0.99), 1e-8, 0.0, after)
    then.state[weight] = {**state}
    weight.grad = gradient
    then.step()
    state = then.state[weight]
    kept = {
        "master": lambda: state[MASTER],
        "kahan": lambda: weight.detach().float() + state["compensation"].float(),
    }.get(after)
    if kept:
        torch.testing.assert_close(kept(), exact, rtol=0, atol=2**-15 if before != "kahan" else 2**-14)
    else:
        assert MASTER not in state
        torch.testing.assert_close(weight.detach().float(), exact, rtol=2**-7, atol=0)
