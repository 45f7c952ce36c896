"""Gradients that leave a pretended device, which copies as late as it may."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import nn

from tests.utils.parallel.late import Late
from utils.diffusion.seeds import normal
from utils.parallel.host_gradients import HostGradients, gradient_bytes

SHAPES = ((3, 5), (7,), (2, 2))


def blocks_of(count: int, dtype: torch.dtype = torch.float32) -> list[list[nn.Parameter]]:
    """Parameters of blocks; one has its dimensions turned."""
    return [
        [nn.Parameter(normal(shape, block, index).to(dtype).t().contiguous().t()) for index, shape in enumerate(SHAPES)]
        for block in range(count)
    ]


def go_back(blocks: Sequence[Sequence[nn.Parameter]], micro_batch: int, spared: int | None = None) -> None:
    """A micro-batch's backward pass, from the last block to the first, in which every block has a gradient of its own
    for every parameter but for the last of the block `spared`."""
    for number in reversed(range(len(blocks))):
        parameters = blocks[number][: -1 if number == spared else None]
        loss = sum(
            (parameter.float() * normal(tuple(parameter.shape), micro_batch, number, index, "g")).sum()
            for index, parameter in enumerate(parameters)
        )
        loss.backward()


def host_gradients(blocks: Sequence[Sequence[nn.Parameter]]) -> HostGradients:
    return HostGradients(blocks, Late(), Late(), pinned=False)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_sums_are_those_of_autograd(count: int) -> None:
    blocks, plain = blocks_of(count), blocks_of(count)
    gradients = host_gradients(blocks)
    for step in range(3):
        for micro_batch in range(3):
            spared = 0 if micro_batch == 1 or step == 2 else None
            for one in (blocks, plain):
                go_back(one, 10 * step + micro_batch, spared)
            assert all(parameter.grad is None for block in blocks for parameter in block)
        gradients.settle()
        for block, others in zip(blocks, plain, strict=True):
            for parameter, other in zip(block, others, strict=True):
                assert (parameter.grad is None) == (other.grad is None)
                if other.grad is not None:
                    assert torch.equal(parameter.grad, other.grad) and parameter.grad.stride() == parameter.stride()
                parameter.grad = other.grad = None


def test_passes_that_bring_nothing_leave_the_sums_as_they_are() -> None:
    blocks, plain = blocks_of(3), blocks_of(3)
    gradients = host_gradients(blocks)
    for micro_batch in range(2):
        for one in (blocks, plain):
            go_back(one, micro_batch)
        for block in (2, 0, 1):
            gradients.expect(block)
    gradients.settle()
    assert all(
        torch.equal(parameter.grad, other.grad)
        for block, others in zip(blocks, plain, strict=True)
        for parameter, other in zip(block, others, strict=True)
    )
    assert any(parameter.grad.any() for parameter in blocks[0])


def test_sums_in_float32_are_counted_as_such() -> None:
    (block,) = blocks_of(1, torch.bfloat16)
    aligned = 256
    assert gradient_bytes(block) == len(SHAPES) * aligned
    large = [nn.Parameter(torch.zeros(1024, dtype=torch.bfloat16))]
    assert gradient_bytes(large) == 2 * 1024
    large[0].grad_dtype = torch.float32
    assert gradient_bytes(large) == 4 * 1024
    gradients = host_gradients([large])
    for _ in range(300):
        large[0].sum().backward()
    gradients.settle()
    # In bfloat16 the sum would have stayed at 256.
    assert large[0].grad.dtype == torch.float32 and (large[0].grad == 300).all()
