"""Backward passes of a dual-stream stage per micro-batch: the stock engine against ours.

Counted on the first of two stages, whose block returns two tensors that require gradients: how often each of the
block's parameters gets a gradient per micro-batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from tests.processes import run_ranks
from utils.ranks import Ranks

MICRO_BATCHES, WIDTH = 4, 8


def measure() -> Iterator[str]:
    for name in ("stock", "ours"):
        calls = run_ranks(count, 2, name)[0]
        yield f"{name}: {calls / MICRO_BATCHES:g} backward passes per micro-batch"


class Dual(nn.Module):
    """A block with two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, fields: tuple) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = torch.tanh(self.linear(fields[0]))
        return hidden, 2 * hidden


class Head(nn.Module):
    """Adds the two streams up."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, 1)

    def forward(self, fields: tuple) -> torch.Tensor:
        return self.linear(fields[0] + fields[1])


def _loss(prediction: torch.Tensor, labels: Any) -> torch.Tensor:
    return prediction.square().flatten(1).mean(1)


def count(ranks: Ranks, name: str) -> int:
    """Gradients that the first stage's weight receives in one step."""
    from utils.parallel.backend import initialize_deepspeed

    initialize_deepspeed()
    torch.manual_seed(0)
    layers, bounds = [Dual(), Head()], [(0, 1), (1, 2)]
    calls = 0

    def hook(_: torch.Tensor) -> None:
        nonlocal calls
        calls += 1

    layers[0].linear.weight.register_post_accumulate_grad_hook(hook)
    data = [((torch.ones(2, WIDTH),), (torch.zeros(2),)) for _ in range(MICRO_BATCHES)]
    _ENGINES[name](layers, bounds).train_batch(iter(data))
    return calls


def ours(layers: list[nn.Module], bounds: list[tuple[int, int]]) -> Any:
    from utils.parallel.engine import Engine
    from utils.parallel.pipeline import DenoiserPipeline

    def stream(*fields: Any) -> tuple:
        return fields

    module = DenoiserPipeline(layers, bounds, stream, _loss)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    return Engine(module, optimizer, accumulation=MICRO_BATCHES, clip_norm=0.0)


def _stock(layers: list[nn.Module], bounds: list[tuple[int, int]]) -> Any:
    import deepspeed
    from deepspeed.pipe import PipelineModule

    module = PipelineModule(
        layers,
        num_stages=2,
        partition_method="uniform",
        loss_fn=lambda prediction, labels: _loss(prediction, labels).mean(),
    )
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": MICRO_BATCHES,
        "steps_per_print": 10**9,
    }
    return deepspeed.initialize(model=module, optimizer=optimizer, config=config)[0]


_ENGINES = {"ours": ours, "stock": _stock}
