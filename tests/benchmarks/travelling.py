"""A step of two data ranks whose gradients travel while others are made, against one that sends them behind the pass.

Full training of blocks of two Linears, one thread a process. For reference the same engine is told that no backward
pass of a step is its last, so that all is sent when they are over. Both alternate; the ratio is that of the medians.
On processors that compute, gloo's threads take of the same cores what they send with; a GPU's links are its own.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator

import torch
from torch import nn

from tests.processes import run_ranks
from utils.ranks import Ranks

BLOCKS, WIDTH, BATCH, TOKENS = 12, 768, 4, 64
ROUNDS, STEPS = 8, 3
WAYS = {"while others are made": True, "behind the pass": False}


class Block(nn.Module):
    """Two Linears beside what comes in."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, fields: tuple) -> tuple:
        return (fields[0] + self.down(self.up(fields[0]).relu()),)


class Head(nn.Module):
    """Gives the only field."""

    def forward(self, fields: tuple) -> torch.Tensor:
        return fields[0]


def measure() -> Iterator[str]:
    seconds = run_ranks(steps, 2)[0]
    for way, value in seconds.items():
        yield f"sent {way}: {1000 * value:.0f} ms a step"
    travelling, behind = seconds.values()
    yield f"ratio {travelling / behind:.3f}"


def steps(ranks: Ranks) -> dict[str, float]:
    """Job of a rank: the median of the seconds of a step, by way."""
    from utils.parallel.backend import initialize_deepspeed
    from utils.parallel.engine import Engine
    from utils.parallel.pipeline import DenoiserPipeline

    initialize_deepspeed()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    layers = [*(Block() for _ in range(BLOCKS)), Head()]
    module = DenoiserPipeline(
        layers, [(0, len(layers))], lambda *fields: fields, lambda y, _: y.square().flatten(1).mean(1)
    )
    engine = Engine(module, torch.optim.SGD(module.parameters(), lr=1e-3), accumulation=1, clip_norm=1.0)
    begin = engine._travelling.begin_backward
    batch = (torch.randn(BATCH, TOKENS, WIDTH),), (torch.zeros(BATCH),)
    found: dict[str, list[float]] = {way: [] for way in WAYS}
    for step in range(ROUNDS * STEPS * len(WAYS)):
        way = list(WAYS)[step // STEPS % len(WAYS)]
        engine._travelling.begin_backward = lambda *, last, way=way: begin(last=last and WAYS[way])
        started = time.perf_counter()
        engine.train_step([batch], step)
        found[way].append(time.perf_counter() - started)
    return {way: statistics.median(values[STEPS:]) for way, values in found.items()}
