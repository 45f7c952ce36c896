"""Steps of every optimizer over the factors of a LoRA, against torch's fused AdamW.

Those in 8 bits have no kernels for the CPU; they are compared where there is a GPU.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from statistics import median

import torch
from torch import nn

import optimizers

SHAPES = [(16, 256), (256, 16)] * 20
RUNS = 3
EVERY = 10
"""SOAP renews its directions in every tenth step, which is part of the mean."""


def seconds_of(optimizer: torch.optim.Optimizer, device: str) -> float:
    """The mean time of a step, of the median of several runs; after a first one, which makes the state."""

    def run() -> float:
        started = time.perf_counter()
        for _ in range(EVERY):
            optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - started) / EVERY

    run()
    return median(run() for _ in range(RUNS))


def factors(device: str) -> list[nn.Parameter]:
    draw = torch.Generator().manual_seed(0)
    made = [nn.Parameter(torch.randn(shape, generator=draw).to(device)) for shape in SHAPES]
    for factor in made:
        factor.grad = torch.randn(factor.shape, generator=draw).to(device)
    return made


def measure() -> Iterator[str]:
    # More would wait for each other on a machine that has other work.
    torch.set_num_threads(1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    fused = seconds_of(torch.optim.AdamW(factors(device), lr=1e-4, fused=True), device)
    elements = sum(factor.numel() for factor in factors(device))
    yield f"{len(SHAPES)} factors, {elements} weights in float32, on the {device}"
    yield f"{'torch, fused AdamW':28} {1 / fused:8.1f} steps/s"
    for name, kind in optimizers.available().items():
        if device in kind.not_on:
            continue
        settings = kind.settings(type=name, lr=1e-4)
        seconds = seconds_of(optimizers.build([{"params": factors(device)}], settings), device)
        yield f"{name:28} {1 / seconds:8.1f} steps/s, {fused / seconds:5.2f} of the fused one's"
