"""Which kernels compute attention on a GPU: torch's, or those of a library that the user names.

Where there is a choice torch takes cuDNN's kernels, which on an H200 need about half the time of its flash attention
(docs/benchmarks.md). Two faults, seen with torch 2.11 and cuDNN 9.19, decide where they are let in:

- With a mask the gradient of a query can be NaN (pytorch#196678): they are kept away from masks.
- The plan of a backward pass is kept by the layouts of query, key and value, but not of the gradient that comes in. If
  two modules of the same shapes get gradients of different layouts, one of them reads the other's memory: Flux's blocks
  did, whose gradients were NaN at a tiny size and an illegal access at full size. Every attention module's gradient is
  therefore brought to one layout.

Everything else, such as text encoders, runs without them.

Libraries are reached by diffusers' dispatcher, which gives a mask to those that take one, and without a word to no
others: what has a mask is computed by torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import nn

from utils import attention_switch
from utils.errors import UserError


class Library(NamedTuple):
    """Kernels that do not come with torch.

    Attributes:
        backend: their name in diffusers' dispatcher.
        module: what is imported.
        install: how it is installed.
        in_float32: whether they compute in it.
    """

    backend: str
    module: str
    install: str
    in_float32: bool = False


LIBRARIES = {
    "flash": Library("flash", "flash_attn", "pip install flash-attn --no-build-isolation"),
    "flash3": Library("_flash_3", "flash_attn_interface", "build `hopper` of the flash-attention sources"),
    "xformers": Library("xformers", "xformers", "pip install xformers", in_float32=True),
}
"""By the value of `attention`. SageAttention has no backward pass, and flex attention without compiling no kernel."""
OWN = "native"
"""Torch's kernels in diffusers' dispatcher."""


def check_kernels(attention: str, denoiser: nn.Module, device_type: str, dtype: torch.dtype) -> None:
    """Whether the denoiser's attention can be computed as `attention` says, where the library is.

    Args:
        dtype: in which the denoiser computes.

    Raises:
        UserError: it cannot here, or not for this model.
    """
    library = LIBRARIES.get(attention)
    if library is None:
        return
    processors = [module.processor for module in denoiser.modules() if hasattr(module, "processor")]
    if not any(hasattr(processor, "_attention_backend") for processor in processors):
        reason = 'is not for this model, whose attention is torch\'s own; write "auto"'
    elif device_type != "cuda":
        reason = 'needs a GPU, and there is none; write "auto"'
    elif dtype.itemsize > 2 and not library.in_float32:
        reason = 'computes in 16 bits alone; write [model] dtype = "bfloat16", or "auto"'
    else:
        return
    raise UserError.of(f'"{attention}" {reason}', where="key `attention`")


def check_library(attention: str) -> None:
    """Whether the library that `attention` names is installed.

    Raises:
        UserError: it is not.
    """
    library = LIBRARIES.get(attention)
    if library and find_spec(library.module) is None:
        reason = f'"{attention}" needs {library.module}, which is not installed: {library.install}'
        raise UserError.of(reason, where="key `attention`")


def set_kernels(attention: str = "auto") -> None:
    """To be called once in a process. Torch computes what `attention` names no library for, and cuDNN's kernels are off
    wherever `kernels_for` does not let them in."""
    attention_switch.turn_off()
    if attention in LIBRARIES:
        from diffusers.models.attention_dispatch import _AttentionBackendRegistry

        _AttentionBackendRegistry.set_active_backend(LIBRARIES[attention].backend)


@contextmanager
def kernels_for(stream: Any) -> Iterator[None]:
    """A context in which cuDNN's kernels, or those of a library, may be taken, unless the stream brings a mask."""
    if not has_mask(stream):
        with attention_switch.turned_on():
            yield
        return
    attention_switch.turn_off()
    with _own_kernels():
        yield


def _own_kernels() -> Any:
    from diffusers.models.attention_dispatch import attention_backend

    return attention_backend(OWN)


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
