"""Gradients are on their way to other data ranks while the backward pass goes on, and what arrives is their mean."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.processes import run_ranks
from utils.parallel import travelling
from utils.parallel.sharding import Shares
from utils.parallel.travelling import shared_by
from utils.ranks import Ranks

WIDTH, BLOCKS = 3, 4


class Block(nn.Module):
    """A weight of its own, and one that all share."""

    def __init__(self, shared: nn.Parameter):
        super().__init__()
        self.own, self.shared = nn.Parameter(torch.randn(WIDTH, WIDTH)), shared

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x @ self.own * self.shared).tanh()


def job(ranks: Ranks, zero_stage: int) -> tuple[list[str], dict[str, list[float]], dict[str, list[float]]]:
    """What happened in two backward passes; the means of gradients over passes and ranks, of which the third block's
    are missing on one rank; and what they are by hand."""
    # So that each weight is a bucket.
    travelling.BUCKET_ELEMENTS, happened = 1, []
    send = {name: getattr(dist, name) for name in ("all_reduce", "reduce")}

    def noted(name: str, tensor: torch.Tensor, *arguments: object, **keys: object) -> object:
        happened.append(f"sent {tensor.numel()}")
        return send[name](tensor, *arguments, **keys)

    for name in send:
        setattr(dist, name, lambda *arguments, name=name, **keys: noted(name, *arguments, **keys))
    torch.manual_seed(0)
    shared = nn.Parameter(torch.randn(2, WIDTH)[0])
    blocks = [Block(shared) for _ in range(BLOCKS)]
    named = {"shared": shared} | {f"own {place}": block.own for place, block in enumerate(blocks)}
    shares = Shares(named, ranks, zero_stage)
    shares.start(dist.group.WORLD, torch.device("cpu"))
    sent = shares.travelling_gradients([list(named.values())], late=shared_by(blocks))
    expected = {name: torch.zeros_like(parameter) for name, parameter in named.items()}
    for number in range(2):
        happened.append("pass")
        sent.begin_backward(0, last=number == 1)
        run(blocks, number, ranks.rank, happened).backward()
        happened.append("end of pass")
        sent.end_backward()
        for rank in range(2):
            gradients = torch.autograd.grad(run(blocks, number, rank), list(named.values()), allow_unused=True)
            for name, gradient in zip(named, gradients, strict=True):
                expected[name] += 0 if gradient is None else gradient / 2
    sent.hand_over()
    kept = {name: p.grad.flatten().tolist() for name, p in named.items() if p.grad is not None}
    return happened, kept, {name: value.flatten().tolist() for name, value in expected.items()}


def run(blocks: list[Block], number: int, rank: int, happened: list[str] | None = None) -> torch.Tensor:
    """The loss of a rank's micro-batch; each block is recomputed."""
    x = torch.full((2, WIDTH), 1.0 + rank + number, requires_grad=True)
    for place, block in enumerate(blocks):
        if place == 2 and rank:
            continue
        if happened is None:
            x = block(x)
        else:
            x.register_hook(lambda gradient, place=place: happened.append(f"behind {place}"))
            x = checkpoint(block, x, use_reentrant=True)
    return x.sum()


@pytest.mark.parametrize("zero_stage", [0, 1, 2])
def test_gradients_travel_while_others_are_made(zero_stage: int) -> None:
    returned = run_ranks(job, 2, zero_stage)
    for happened, kept, expected in returned:
        assert all(value == pytest.approx(expected[name]) for name, value in kept.items())
        assert kept.keys() == expected.keys() or zero_stage == 2
        last = happened.index("pass", 1)
        sent_in_first = [event for event in happened[:last] if event.startswith("sent")]
        assert len(sent_in_first) == (BLOCKS + 1 if zero_stage == 2 else 0), "once a step, or in every pass"
        within = happened[last : happened.index("end of pass", last)]
        # A block's weight is sent before what is before it has its gradients.
        assert within.index(f"sent {WIDTH**2}") < within.index("behind 1")
        assert f"sent {WIDTH}" not in within, "what blocks share is whole behind the pass"
    assert set().union(*(kept for _, kept, _ in returned)) == returned[0][2].keys()
    # The rank that has all gradients sends them all within the pass; the other one waits for the one that it lacks.
    whole, lacking = (
        happened[happened.index("pass", 1) : happened.index("end of pass", happened.index("pass", 1))]
        for happened, _, _ in returned
    )
    assert [one.count(f"sent {WIDTH**2}") for one in (whole, lacking)] == [BLOCKS, 1]
