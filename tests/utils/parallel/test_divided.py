"""Blocks whose weights lie divided among ranks, against the same blocks that have all of theirs."""

from __future__ import annotations

import copy
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from tests.processes import run_ranks
from tests.utils.parallel.late import Late
from tests.utils.parallel.test_swap import Odd, call
from utils.parallel import travelling
from utils.parallel.divided import Division
from utils.parallel.homes import BlockHomes
from utils.parallel.sharding import Shares, owners
from utils.parallel.swap import BlockSwap
from utils.parallel.swap_plan import SwapPlan
from utils.ranks import Ranks

BLOCKS = 5
STEPS = 2


def blocks_of(*, trained: bool) -> list[nn.Module]:
    """Blocks with tensors of all sorts."""
    torch.manual_seed(0)
    layers = [Odd(nn.Parameter(torch.randn(3), requires_grad=False)) for _ in range(BLOCKS)]
    for layer in layers:
        layer.shared.requires_grad_(trained)
        layer.turned.requires_grad_(trained)
    return layers


def swap_of(layers: list[nn.Module], ranks: Ranks, *, trained: bool, on_host: int) -> BlockSwap:
    parameters = [p for layer in layers for p in layer.parameters() if p.requires_grad]
    found = owners({str(number): p.numel() for number, p in enumerate(parameters)}, ranks.data_ranks)
    owner_of = {id(p): found[str(number)] for number, p in enumerate(parameters)}
    division = Division(ranks.data_rank, ranks.data_ranks, (lambda tensor: owner_of[id(tensor)]) if trained else None)
    return BlockSwap(BlockHomes(layers, on_host, trained=trained, division=division).filled())


def forward(swap: BlockSwap, layers: list[nn.Module], x: torch.Tensor) -> torch.Tensor:
    for position, layer in enumerate(layers):
        x = swap.run(position, layer, partial(call, x), recomputed=False)
    return x


def losses_of(ranks: Ranks, trained: bool, on_host: int) -> dict[str, Any]:
    """What steps of gradient descent make of blocks, and what they do without a division."""
    layers = blocks_of(trained=trained)
    plain = copy.deepcopy(layers)
    swap = swap_of(layers, ranks, trained=trained, on_host=on_host)
    swap.start(torch.device("cpu"), dist.group.WORLD, Late())
    # The same on all ranks, so that their gradients are the means.
    x = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    pairs = list(
        zip(
            (p for one in layers for p in one.parameters()), (p for one in plain for p in one.parameters()), strict=True
        )
    )
    seen: list[bool] = []
    for _ in range(STEPS):
        # One has more to look at than the other, between two steps.
        with swap.hand_in_hand(), torch.no_grad():
            for _ in range(ranks.rank):
                with swap.evaluation(1), swap.forward_pass():
                    seen.append(torch.equal(forward(swap, layers, x), nn.Sequential(*plain)(x)))
        with swap.forward_pass():
            found = forward(swap, layers, x)
        expected = nn.Sequential(*plain)(x)
        seen.append(torch.equal(found, expected))
        found.sum().backward()
        expected.sum().backward()
        swap.settle()
        for parameter, other in pairs:
            seen.append(parameter.grad is None if other.grad is None else torch.equal(parameter.grad, other.grad))
            if other.grad is not None:
                with torch.no_grad():
                    # To those that others have nothing can be added.
                    if not parameter.isnan().any():
                        parameter -= 0.1 * parameter.grad
                    other -= 0.1 * other.grad
                parameter.grad = other.grad = None
    at_home = [parameter.detach() for parameter, _ in pairs]
    return {
        "same": seen,
        "here": [bool(torch.equal(parameter, other)) for parameter, other in pairs],
        "trained": [parameter.requires_grad for parameter, _ in pairs],
        "no values": [bool(parameter.isnan().all()) for parameter in at_home],
        "on host": [block.on_host for block in swap._blocks],
        "kept": [block.home.nbytes for block in swap._blocks],
        "sizes": [block.size for block in swap._blocks],
    }


def divide(ranks: Ranks) -> list[dict[str, Any]]:
    """Job of a rank."""
    return [losses_of(ranks, trained, on_host) for trained in (False, True) for on_host in (0, 3)]


@pytest.fixture(scope="module")
def ways() -> list[list[dict[str, Any]]]:
    """By rank what each way leaves."""
    return run_ranks(divide, 2)


def test_gathered_weights_are_those_of_all_ranks(ways: list[list[dict[str, Any]]]) -> None:
    """With gathers that are as late as they may be, and on ranks of which one evaluates more than the other."""
    for rank, of_rank in enumerate(ways):
        for way in of_rank:
            assert all(way["same"]) and len(way["same"]) > STEPS * (1 + rank)


def test_a_trained_weight_is_whole_on_its_owner_and_nowhere_else(ways: list[list[dict[str, Any]]]) -> None:
    for first, second in zip(*(of_rank[2:] for of_rank in ways), strict=True):
        for way in (first, second):
            assert way["no values"] == [not here for here in way["here"]]
            assert 0 < sum(way["no values"]) < sum(way["trained"])
        for here, there, trained in zip(first["here"], second["here"], first["trained"], strict=True):
            assert here != there if trained else here and there


def test_each_rank_keeps_its_part(ways: list[list[dict[str, Any]]]) -> None:
    for first, second in zip(*ways, strict=True):
        assert [one + other for one, other in zip(first["kept"], second["kept"], strict=True)] == first["sizes"]
    frozen, on_host = ways[0][:2]
    assert frozen["kept"] == [size / 2 for size in frozen["sizes"]]
    assert sum(frozen["on host"]) == 0 and on_host["on host"] == [True, False, True, False, True]


def test_pieces_end_where_the_next_begins() -> None:
    layers = blocks_of(trained=True)
    plan = SwapPlan.of_divided(layers, trained=True)
    for data_ranks in (1, 2, 3, 7):
        for owner_of in (None, lambda tensor, ranks=data_ranks: tensor.numel() % ranks):
            division = Division(0, data_ranks, owner_of)
            for tensors in plan.blocks.values():
                ends = division.ends(tensors)
                assert len(ends) == data_ranks and all(one <= other for one, other in pairwise(ends))
                assert ends[-1] >= sum(one.tensor.nbytes for one in tensors)


class Chosen(nn.Module):
    """A block with two weights, of which some calls use one."""

    recomputable = True

    def __init__(self):
        super().__init__()
        self.first, self.second = (nn.Parameter(torch.randn(3, 3)) for _ in range(2))
        self.uses_second = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = (x @ self.first).tanh()
        return (x @ self.second).tanh() if self.uses_second else x


def means_of(ranks: Ranks) -> list[list[list[float] | None]]:
    """Job of a rank: the means of gradients over the ranks, of which the second leaves out weights of some blocks;
    at their owners without weights that are divided, and with them, and on all ranks."""
    # So that each weight is a bucket.
    travelling.BUCKET_ELEMENTS, found = 9, []
    for zero_stage, divides in ((2, False), (2, True), (0, False)):
        torch.manual_seed(0)
        layers = [Chosen() for _ in range(BLOCKS)]
        for layer in layers[1:3]:
            layer.uses_second = ranks.rank == 0
        named = {f"{place}.{name}": p for place, layer in enumerate(layers) for name, p in layer.named_parameters()}
        trained = list(named.values())
        shares = Shares(named, ranks, zero_stage, apart=trained if divides else ())
        division = Division(ranks.data_rank, 2, shares.owner_of) if divides else None
        swap = BlockSwap(BlockHomes(layers, trained=True, division=division).filled() if divides else None)
        swap.start(torch.device("cpu"), dist.group.WORLD)
        shares.start(dist.group.WORLD, torch.device("cpu"))
        sent = shares.travelling_gradients([trained], layers=layers if divides else None)
        swap.going_back = sent.reduce_behind if divides else None
        with swap.forward_pass():
            out = forward(swap, layers, torch.ones(2, 3) * (1 + ranks.rank))
        sent.begin_backward(0, last=True)
        out.sum().backward()
        sent.end_backward()
        swap.settle()
        sent.hand_over()
        found.append([None if p.grad is None else p.grad.flatten().tolist() for p in trained])
    return found


def test_a_rank_without_some_gradient_keeps_the_order_of_the_others() -> None:
    """Gathers and sums of gradients come in one order on all ranks; else these would wait for one another."""
    owned, everywhere = [], []
    for without, divided, whole in run_ranks(means_of, 2):
        assert divided == without and sum(one is not None for one in divided) == BLOCKS
        owned.append(divided)
        everywhere.append(whole)
    assert everywhere[0] == everywhere[1] == [one or other for one, other in zip(*owned, strict=True)]
