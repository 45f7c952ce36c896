"""The most memory that a computation without gradients takes at once, counted on the meta device."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from models.assembly.activations import tensors_of
from models.assembly.known_operations import KnownOperations
from utils.parallel.partition import Range


class LiveBytes(TorchDispatchMode):
    """Counts the storages that are made on the meta device within this context, from when they are made until nobody
    has them. What else is made stays on the CPU.

    Attributes:
        live: bytes at the moment.
        peak: the most since the context began, or since somebody set it back to `live`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, operation: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        made = operation(*args, **kwargs)
        given = {one.untyped_storage()._cdata for one in (*tensors_of(args), *tensors_of(tuple(kwargs.values())))}
        for tensor in tensors_of(made):
            storage = tensor.untyped_storage()
            if tensor.is_meta and storage._cdata not in given:
                self._add(storage)
        return made

    def _add(self, storage: torch.UntypedStorage) -> None:
        number, size = storage._cdata, storage.nbytes()
        if number in self._seen:
            return

        def gone(_: Any) -> None:
            self._seen.pop(number, None)
            self.live -= size

        self._seen[number] = weakref.ref(storage, gone)
        self.live += size
        self.peak = max(self.peak, self.live)


class _Attention(TorchFunctionMode):
    """Attention that takes what a GPU's kernels take: its output, and a float32 number for each of its rows."""

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is not scaled_dot_product_attention:
            return function(*args, **kwargs)
        query, _, value = (*args, *(kwargs[name] for name in ("query", "key", "value") if name in kwargs))[:3]
        query.new_empty(query.shape[:-1], dtype=torch.float32)
        return query.new_empty((*query.shape[:-1], value.shape[-1]))


@torch.no_grad()
def most_at_once(compute: Callable[[], Any]) -> int:
    """The bytes that a computation on the meta device takes at its peak, beside what it is given."""
    with _Attention(), KnownOperations(), LiveBytes() as counted:
        compute()
    return counted.peak


@dataclass(frozen=True)
class ForwardRun:
    """A forward pass of some layers without gradients.

    Attributes:
        peaks: the most bytes in each layer, with what it is given.
        entering: the bytes of what each is given.
    """

    peaks: Sequence[int]
    entering: Sequence[int]

    def peak(self, pieces: Sequence[Range]) -> int:
        """Of a stage with these pieces, each of which keeps what it was given until its end."""
        return max(
            max(self.peaks[start], self.entering[start] + max(self.peaks[start + 1 : stop], default=0))
            for start, stop in pieces
        )


@torch.no_grad()
def run_forward(layers: Sequence[nn.Module], stream: Any) -> ForwardRun:
    """Runs all layers on a first stream, which is on the meta device."""
    peaks, entering = [], []
    first = sum(tensor.nbytes for tensor in tensors_of(stream))
    with _Attention(), KnownOperations(), LiveBytes() as counted:
        for position, layer in enumerate(layers):
            given = counted.live if position else first
            counted.peak = counted.live
            stream = layer.to("meta")(stream)
            entering.append(given)
            peaks.append(counted.peak + (first if position == 0 else 0))
    return ForwardRun(peaks, entering)
