"""Attention: which kernels are right where we use them, and how fast.

The reference is attention in float32 on bfloat16's values. What is known to be wrong is tried in processes of its own,
since it can take the device with it.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from tests.benchmarks.gpu.timing import median_seconds
from utils.parallel.attention import _ContiguousGradient

KERNELS = {
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
SHAPES = {"Flux 1024": (24, 4608), "Wan 14B 832x480x49": (40, 20280)}
"""Heads and tokens, of 128 channels a head."""
SMALL_BHLC = (2, 4, 320, 64)
TOLERANCE = 0.01


def measure() -> Iterator[tuple[str, str]]:
    for name, kernel in KERNELS.items():
        yield f"{name}, gradients of one layout", _verdict(_errors(kernel, ["plain", "plain"], corrected=False))
    for name, layouts in {"slices, then whole": ["slice", "plain"], "whole, then slices": ["plain", "slice"]}.items():
        for corrected in (False, True):
            label = f"cuDNN, gradients as {name}{', made contiguous as here' if corrected else ''}"
            yield label, _apart(layouts, corrected)
    yield "cuDNN with a mask (pytorch#196678)", _masked(SDPBackend.CUDNN_ATTENTION)
    yield "efficient with a mask", _masked(SDPBackend.EFFICIENT_ATTENTION)
    for shape, (heads, tokens) in SHAPES.items():
        for masked in (False, True):
            found = {name: _milliseconds(kernel, heads, tokens, masked) for name, kernel in KERNELS.items()}
            yield (
                f"{shape}{', a mask over keys' if masked else ''}, forward and backward",
                ", ".join(f"{name} {value}" for name, value in found.items()),
            )


def _errors(kernel: SDPBackend, layouts: list[str], *, corrected: bool) -> list[float]:
    """The largest relative error of a gradient of query, key or value, for one call after the other."""
    return [_error(kernel, layout, corrected) for layout in layouts]


def _error(kernel: SDPBackend, layout: str, corrected: bool) -> float:
    torch.manual_seed(0)
    batch, heads, tokens, channels = SMALL_BHLC
    made = [torch.randn(batch, tokens, heads, channels, device="cuda").bfloat16() for _ in range(3)]
    beside = torch.randn(batch, tokens, 3 * heads * channels if layout == "slice" else 0, device="cuda").bfloat16()
    weight = torch.randn(batch, tokens, heads * channels + beside.shape[2], device="cuda").bfloat16()

    def gradients(dtype: torch.dtype, which: SDPBackend) -> list[torch.Tensor]:
        inputs = [tensor.to(dtype).requires_grad_() for tensor in made]
        with sdpa_kernel(which):
            out = scaled_dot_product_attention(*(tensor.transpose(1, 2) for tensor in inputs))
        flat = out.transpose(1, 2).flatten(2)
        flat = _ContiguousGradient.apply(flat) if corrected else flat
        (torch.cat([flat, beside.to(dtype)], dim=2) * weight.to(dtype)).sum().backward()
        return [tensor.grad.float() for tensor in inputs]

    wanted = gradients(torch.float32, SDPBackend.MATH)
    got = gradients(torch.bfloat16, kernel)
    torch.cuda.synchronize()
    return max(((a - b).norm() / b.norm()).item() for a, b in zip(got, wanted, strict=True))


def _verdict(errors: list[float]) -> str:
    worst = max(errors, key=lambda error: error if error == error else float("inf"))
    return f"{'right' if worst < TOLERANCE else 'WRONG'}, relative error {worst:.4f}"


def _apart(layouts: list[str], corrected: bool) -> str:
    code = (
        f"import {__name__} as own; "
        f"print(own._verdict(own._errors(own.KERNELS['cuDNN'], {layouts!r}, corrected={corrected})))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    if run.returncode == 0:
        return run.stdout.strip().splitlines()[-1]
    errors = [line for line in run.stderr.splitlines() if "Error" in line]
    return f"WRONG, {errors[-1] if errors else 'no reason given'}"


def _masked(kernel: SDPBackend) -> str:
    """Logits of -120 in a sequence whose length is 64 more than a multiple of 128, and a mask that hides nothing."""
    torch.manual_seed(0)
    tokens, channels = 704, 64
    query, key, value = (torch.randn(1, 1, tokens, channels, device="cuda").bfloat16() for _ in range(3))
    query, key = query * 0.1, key * 0.1
    query[..., 0], key[..., 0] = 1.0, -120 * channels**0.5
    query.requires_grad_()
    mask = torch.ones(1, 1, tokens, tokens, dtype=torch.bool, device="cuda")
    with sdpa_kernel(kernel):
        scaled_dot_product_attention(query, key, value, attn_mask=mask).sum().backward()
    wrong = int((~torch.isfinite(query.grad)).sum())
    return f"WRONG, {wrong} gradients are not finite" if wrong else "right"


def _milliseconds(kernel: SDPBackend, heads: int, tokens: int, masked: bool) -> str:
    inputs = [
        torch.randn(1, heads, tokens, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3)
    ]
    mask = torch.ones(1, 1, 1, tokens, dtype=torch.bool, device="cuda") if masked else None
    if masked and kernel == SDPBackend.FLASH_ATTENTION:
        return "takes no mask"

    def once() -> None:
        with sdpa_kernel(kernel):
            scaled_dot_product_attention(*inputs, attn_mask=mask).sum().backward()

    return f"{1000 * median_seconds(once, runs=3, warm_up=1):.2f} ms"
