"""A step of two data ranks whose gradients travel while others are made, against one that sends them behind the pass.

Full training of blocks of two Linears, one thread a process, over a link that is made up, as a GPU's is its own: a sum
over the ranks takes a time that follows from its bytes, and none of the processor's, one sum after another. For
reference the same engine is told that no backward pass of a step is its last, so that all is sent when they are over.
Both alternate; the times are medians. All that can be hidden is all but the last bucket.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from tests.processes import run_ranks
from utils.parallel import travelling
from utils.ranks import Ranks

BLOCKS, WIDTH, BATCH, TOKENS = 12, 768, 4, 64
ROUNDS, STEPS = 8, 3
LINK_SECONDS = 0.06
"""For all gradients of a step."""
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


class Link:
    """In place of sums over the ranks: what says when they would be over."""

    def __init__(self, seconds_a_byte: float):
        self._seconds_a_byte, self._free = seconds_a_byte, 0.0

    def all_reduce(self, tensor: torch.Tensor, **_: object) -> Sum:
        self._free = max(self._free, time.perf_counter()) + tensor.nbytes * self._seconds_a_byte
        return Sum(self._free)


class Sum(NamedTuple):
    """One that is over at some time."""

    end: float

    def wait(self) -> None:
        time.sleep(max(0.0, self.end - time.perf_counter()))


def measure() -> Iterator[str]:
    seconds = run_ranks(steps, 2)[0]
    for way, value in seconds.items():
        yield f"sent {way}: {1000 * value:.0f} ms a step"
    beside, behind = seconds.values()
    yield f"hidden {(behind - beside) / LINK_SECONDS:.2f} of the {1000 * LINK_SECONDS:.0f} ms on the link"


def steps(ranks: Ranks) -> dict[str, float]:
    """Job of a rank: the median of the seconds of a step, by way."""
    from utils.parallel.backend import initialize_deepspeed
    from utils.parallel.engine import Engine
    from utils.parallel.pipeline import DenoiserPipeline

    initialize_deepspeed()
    # So that each Linear is one.
    travelling.BUCKET_ELEMENTS = WIDTH * (WIDTH + 1)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    layers = [*(Block() for _ in range(BLOCKS)), Head()]
    module = DenoiserPipeline(
        layers, [(0, len(layers))], lambda *fields: fields, lambda y, _: y.square().flatten(1).mean(1)
    )
    engine = Engine(module, torch.optim.SGD(module.parameters(), lr=1e-3), accumulation=1, clip_norm=1.0)
    begin = engine._travelling.begin_backward
    gradients = sum(parameter.numel() for parameter in module.parameters()) * torch.float32.itemsize
    travelling.dist = SimpleNamespace(**{**vars(dist), "all_reduce": Link(LINK_SECONDS / gradients).all_reduce})
    batch = (torch.randn(BATCH, TOKENS, WIDTH),), (torch.zeros(BATCH),)
    found: dict[str, list[float]] = {way: [] for way in WAYS}
    for step in range(ROUNDS * STEPS * len(WAYS)):
        way = list(WAYS)[step // STEPS % len(WAYS)]
        engine._travelling.begin_backward = lambda piece, *, last, way=way: begin(piece, last=last and WAYS[way])
        started = time.perf_counter()
        engine.train_step([batch], step)
        found[way].append(time.perf_counter() - started)
    return {way: statistics.median(values[STEPS:]) for way, values in found.items()}
