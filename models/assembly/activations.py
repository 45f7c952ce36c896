"""What autograd keeps of a stage's layers, counted on the meta device, which allocates nothing."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode


@dataclass(frozen=True)
class LayerActivations:
    """Bytes of one layer for one micro-batch.

    Attributes:
        kept: from its forward pass to its backward pass, without what a layer before it keeps too.
        passing: during its backward pass alone: what it keeps again when it is recomputed, and the gradient of its
            output.
    """

    kept: int = 0
    passing: int = 0


def peak(layers: Sequence[LayerActivations], in_flight: int) -> int:
    """The most bytes that a stage's layers take at once, while one of the micro-batches in flight goes back through
    them."""
    kept, highest = 0, 0
    for layer in layers:
        kept += layer.kept
        highest = max(highest, kept + layer.passing)
    return (in_flight - 1) * kept + highest


def count(
    layers: Sequence[nn.Module], starts: Collection[int], stream: Any, held: Sequence[torch.Tensor], *, recompute: bool
) -> list[LayerActivations]:
    """The activations of every layer.

    Args:
        starts: positions of the layers with which stages begin: a stage has its own copy of what comes in.
        stream: the input of the first layer, on the meta device.
        held: parameters and buffers, which are kept anyway.
        recompute: the repeated blocks keep only their input.
    """
    held_storages = {tensor.untyped_storage()._cdata for tensor in held}
    counted, alive, seen = [], [], set(held_storages)
    with _LightAttention():
        for position, layer in enumerate(layers):
            if position in starts:
                seen = set(held_storages)
            saved: list[torch.Tensor] = []
            # What was seen stays alive, so that no other storage takes its number.
            alive += [stream, saved]

            def keep(tensor: torch.Tensor, saved: list[torch.Tensor] = saved) -> torch.Tensor:
                saved.append(tensor)
                return tensor

            inputs = list(_tensors(stream))
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                stream = layer.to("meta")(stream)
            only_input = recompute and getattr(layer, "recomputable", False)
            kept = _new_bytes(inputs if only_input else saved, seen)
            again = _new_bytes(saved, set(seen)) if only_input else 0
            gradient = sum(tensor.nbytes for tensor in _tensors(stream) if tensor.requires_grad)
            counted.append(LayerActivations(kept, again + gradient))
    return counted


def _new_bytes(tensors: Sequence[torch.Tensor], seen: set[int]) -> int:
    """The bytes of the storages of `tensors` that are not in `seen`, to which they are added."""
    storages = {storage._cdata: storage.nbytes() for storage in (tensor.untyped_storage() for tensor in tensors)}
    new = {number: size for number, size in storages.items() if number not in seen}
    seen.update(new)
    return sum(new.values())


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, tuple):
        for part in value:
            yield from _tensors(part)


class _LightAttention(TorchFunctionMode):
    """Counts attention as the kernels of GPUs do it. On the meta device torch computes it with a whole matrix of
    tokens by tokens, which takes many times the memory of all else."""

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is scaled_dot_product_attention:
            query, key, value = (*args, *(kwargs[name] for name in ("query", "key", "value") if name in kwargs))[:3]
            return _Attention.apply(query, key, value)
        return function(*args, **kwargs)


class _Attention(torch.autograd.Function):
    """Query, key and value (..., tokens, channels) -> an output of the right form; keeps what flash attention does (Dao
    2023, "FlashAttention-2", algorithm 1): these, the output, and a float32 number for each row."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        output = torch.empty_like(query[..., :1].expand(*query.shape[:-1], value.shape[-1]))
        ctx.save_for_backward(query, key, value, output, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return output

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[None, None, None]:
        raise AssertionError("activations are counted on the way forward")
