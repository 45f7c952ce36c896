"""A step of our AdamW over the factors of a LoRA of Qwen-Image, against torch's fused kernel."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from optimizers.adamw import AdamW
from tests.benchmarks.gpu.timing import median_seconds

FACTORS, SHAPE = 1680, (32, 3072)


def measure() -> Iterator[tuple[str, str]]:
    for dtype in (torch.float32, torch.bfloat16):
        factors = [nn.Parameter(torch.randn(SHAPE, device="cuda", dtype=dtype)) for _ in range(FACTORS)]
        for factor in factors:
            factor.grad = torch.randn_like(factor)
        ours = median_seconds(AdamW(factors, 1e-4, (0.9, 0.99), 1e-8, 0.01).step, runs=5)
        torchs = median_seconds(torch.optim.AdamW(factors, lr=1e-4, fused=True).step, runs=5)
        yield f"AdamW, {FACTORS} factors in {dtype}", f"{1000 * ours:.1f} ms, torch's fused {1000 * torchs:.1f} ms"
