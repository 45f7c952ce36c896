"""What autograd keeps of a stage's layers, counted on the meta device, which allocates nothing."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from utils.parallel.offload import SMALLEST


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
    layers: Sequence[nn.Module],
    starts: Collection[int],
    stream: Any,
    held: Sequence[torch.Tensor],
    *,
    recomputed: Collection[int] = (),
    offload: bool = False,
) -> list[LayerActivations]:
    """The activations of every layer.

    Args:
        starts: positions of the layers with which stages begin: a stage has its own copy of what comes in.
        stream: the input of the first layer, on the meta device.
        held: parameters and buffers, which are kept anyway.
        recomputed: positions of the layers that keep only their input.
        offload: these keep of it what is small or passed on; the rest travels, and arrives one layer early.
    """
    held_storages = {tensor.untyped_storage()._cdata for tensor in held}
    counted, alive, seen, arriving = [], [], set(held_storages), 0
    with _LightAttention():
        for position, layer in enumerate(layers):
            if position in starts:
                seen, arriving = set(held_storages), 0
            saved: list[torch.Tensor] = []
            # What was seen stays alive, so that no other storage takes its number.
            alive += [stream, saved]

            def keep(tensor: torch.Tensor, saved: list[torch.Tensor] = saved) -> torch.Tensor:
                saved.append(tensor)
                return tensor

            inputs = list(_tensors(stream))
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                stream = layer.to("meta")(stream)
            gradient = sum(tensor.nbytes for tensor in _tensors(stream) if tensor.requires_grad)
            if position not in recomputed:
                counted.append(LayerActivations(_new_bytes(saved, seen), gradient))
                continue
            again = _new_bytes([*inputs, *saved], set(seen))
            travelling = _travelling(inputs, list(_tensors(stream))) if offload else []
            kept = _new_bytes([tensor for tensor in inputs if id(tensor) not in map(id, travelling)], seen)
            counted.append(LayerActivations(kept, again - kept + gradient + arriving))
            arriving = sum(tensor.nbytes for tensor in travelling) or arriving
    return counted


def _travelling(inputs: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The inputs of a layer that leave the device."""
    passed_on = set(map(id, outputs))
    return [tensor for tensor in inputs if id(tensor) not in passed_on and tensor.nbytes >= SMALLEST]


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
