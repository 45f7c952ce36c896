"""Which kernels of torch compute attention on a GPU.

Where there is a choice torch takes cuDNN's kernels, which on an H200 need about half the time of its flash attention
(docs/benchmarks.md). Two faults, seen with torch 2.11 and cuDNN 9.19, decide where they are let in:

- With a mask the gradient of a query can be NaN (pytorch#196678): they are kept away from masks.
- The plan of a backward pass is kept by the layouts of query, key and value, but not of the gradient that comes in. If
  two modules of the same shapes get gradients of different layouts, one of them reads the other's memory: Flux's blocks
  did, whose gradients were NaN at a tiny size and an illegal access at full size. Every attention module's gradient is
  therefore brought to one layout.

Everything else, such as text encoders, runs without them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


def set_kernels() -> None:
    """To be called once in a process: cuDNN's kernels are off wherever `kernels_for` does not let them in."""
    torch.backends.cuda.enable_cudnn_sdp(False)


@contextmanager
def kernels_for(stream: Any) -> Iterator[None]:
    """A context in which cuDNN's kernels may be taken, unless the stream brings a mask."""
    torch.backends.cuda.enable_cudnn_sdp(not has_mask(stream))
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(False)


def has_mask(stream: Any) -> bool:
    """Whether a field of a stream is a mask: in streams, tensors of bool are masks of attention and nothing else."""
    return any(isinstance(field, torch.Tensor) and field.dtype == torch.bool for field in stream)


def give_gradients_one_layout(denoiser: nn.Module) -> None:
    """Lets the gradient of every attention module's output arrive contiguous. Where it is, as in most blocks, this
    costs nothing."""
    for module in denoiser.modules():
        if hasattr(module, "processor"):  # what diffusers' attention modules have in common
            module.register_forward_hook(_with_contiguous_gradients)


def _with_contiguous_gradients(module: nn.Module, inputs: tuple, output: Any) -> Any:
    if isinstance(output, tuple):
        return tuple(_with_contiguous_gradients(module, inputs, part) for part in output)
    return _ContiguousGradient.apply(output) if isinstance(output, torch.Tensor) else output


class _ContiguousGradient(torch.autograd.Function):
    """Its input; the gradient is made contiguous."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient.contiguous()
