"""What autograd keeps of a stage's layers, counted on the meta device, which allocates nothing."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from models.assembly.known_operations import KnownOperations
from utils.parallel.interleaved import InFlight
from utils.parallel.offload import SMALLEST

Storages = Mapping[int, int]
"""Number of a storage -> its bytes."""


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


def peak(pieces: Sequence[Sequence[LayerActivations]], in_flight: Collection[InFlight]) -> int:
    """The most bytes that the layers of a stage's pieces take at once, while one of the micro-batches in flight goes
    back through one of them."""
    kept = [sum(layer.kept for layer in piece) for piece in pieces]
    highest = [_at_the_highest_layer(piece) for piece in pieces]
    return max(
        sum(count * size for count, size in zip(counts, kept, strict=True)) - kept[piece] + highest[piece]
        for piece, counts in in_flight
    )


def _at_the_highest_layer(piece: Sequence[LayerActivations]) -> int:
    kept, highest = 0, 0
    for layer in piece:
        kept += layer.kept
        highest = max(highest, kept + layer.passing)
    return highest


@dataclass(frozen=True)
class LayerRun:
    """A layer's forward pass on the meta device. All tensors stay alive, so that no storage takes another's number.

    Attributes:
        inputs, outputs: the tensors of its stream before and after.
        saved: what autograd keeps.
    """

    inputs: Sequence[torch.Tensor]
    outputs: Sequence[torch.Tensor]
    saved: Sequence[torch.Tensor]

    @cached_property
    def kept(self) -> Storages:
        """Of what autograd keeps."""
        return storages(self.saved)

    @cached_property
    def kept_again(self) -> Storages:
        """Of what there is when the layer has been recomputed."""
        return storages([*self.inputs, *self.saved])

    @cached_property
    def gradient(self) -> int:
        """The bytes of the gradients of its outputs."""
        return sum(tensor.nbytes for tensor in self.outputs if tensor.requires_grad)

    @cached_property
    def travelling(self) -> Sequence[torch.Tensor]:
        """The inputs that may leave the device: those that are not passed on, and not small."""
        passed_on = set(map(id, self.outputs))
        return [tensor for tensor in self.inputs if id(tensor) not in passed_on and tensor.nbytes >= SMALLEST]

    @cached_property
    def staying(self) -> Storages:
        """Of the other inputs."""
        travelling = set(map(id, self.travelling))
        return storages([tensor for tensor in self.inputs if id(tensor) not in travelling])

    @cached_property
    def entering(self) -> Storages:
        """Of all inputs."""
        return storages(self.inputs)


def run_layers(layers: Sequence[nn.Module], stream: Any) -> list[LayerRun]:
    """Runs layers one after another.

    Args:
        stream: the input of the first layer, on the meta device.
    """
    runs = []
    with LightAttention(), KnownOperations():
        for layer in layers:
            saved: list[torch.Tensor] = []

            def keep(tensor: torch.Tensor, saved: list[torch.Tensor] = saved) -> torch.Tensor:
                saved.append(tensor)
                return tensor

            inputs = list(tensors_of(stream))
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                stream = layer.to("meta")(stream)
            runs.append(LayerRun(inputs, list(tensors_of(stream)), saved))
    return runs


def activations_of(
    runs: Sequence[LayerRun], held: Collection[int], *, recomputed: Collection[int] = (), offload: bool = False
) -> list[LayerActivations]:
    """The activations of every layer of a stage, which has its own copy of what comes in.

    Args:
        runs: of its layers.
        held: the storages of parameters and buffers, which are kept anyway.
        recomputed: positions in the stage of the layers that keep only their input.
        offload: these keep of it what is small or passed on; the rest travels, and arrives one layer early.
    """
    counted, seen, arriving = [], set(held), 0
    for position, run in enumerate(runs):
        if position not in recomputed:
            counted.append(LayerActivations(_new_bytes(run.kept, seen), run.gradient))
            continue
        again = _new_bytes(run.kept_again, set(seen))
        kept = _new_bytes(run.staying if offload else run.entering, seen)
        counted.append(LayerActivations(kept, again - kept + run.gradient + arriving))
        if offload:
            arriving = sum(tensor.nbytes for tensor in run.travelling) or arriving
    return counted


def storages(tensors: Sequence[torch.Tensor]) -> dict[int, int]:
    """The storages of tensors."""
    return {storage._cdata: storage.nbytes() for storage in (tensor.untyped_storage() for tensor in tensors)}


def tensors_of(value: Any) -> Iterator[torch.Tensor]:
    """The tensors of a stream, of what a last layer returns, or of what an operation takes and makes."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for part in value:
            yield from tensors_of(part)


def _new_bytes(found: Storages, seen: set[int]) -> int:
    """The bytes of the storages that are not in `seen`, to which they are added."""
    new = {number: size for number, size in found.items() if number not in seen}
    seen.update(new)
    return sum(new.values())


class LightAttention(TorchFunctionMode):
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
    2023, "FlashAttention-2", algorithm 1): these, the output, and a float32 number for each row. Its products are
    those of that paper: two on the way forward and five on the way back, where the matrix is made again."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        output = torch.empty_like(query[..., :1].expand(*query.shape[:-1], value.shape[-1]))
        ctx.save_for_backward(query, key, value, output, query.new_empty(query.shape[:-1], dtype=torch.float32))
        _products(query, key.shape[-2], of_queries=1, of_values=1, width=value.shape[-1])
        return output

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, ...]:
        query, key, value, *_ = ctx.saved_tensors
        _products(query, key.shape[-2], of_queries=3, of_values=2, width=value.shape[-1])
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _products(query: torch.Tensor, keys: int, *, of_queries: int, of_values: int, width: int) -> None:
    """So many products between all queries and all keys, for whoever counts operations: over the channels of queries,
    and over those of values."""
    batch, tokens = query.shape[:-2].numel(), query.shape[-2]
    for channels in [query.shape[-1]] * of_queries + [width] * of_values:
        torch.bmm(query.new_empty(batch, tokens, channels), query.new_empty(batch, channels, keys))
