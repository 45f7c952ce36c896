"""The inputs of recomputed layers, kept in the host's memory from the forward pass to the backward pass.

They leave the device while the next layer computes, and come back while the layer behind it goes back, so that neither
pass waits for them where a layer computes longer than its input travels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from utils.parallel.transfers import Mark, Transfers, dense_strides, host_memory, transfers_to

SMALLEST = 2**18
"""In bytes: a copy of less takes as long as one of this, and frees nothing to speak of."""


class HostBuffer(NamedTuple):
    """Memory of the host, uint8, and when all that was asked for from it has been read."""

    memory: torch.Tensor
    free: Mark | None = None


class Copy(NamedTuple):
    """A tensor in the host's memory, and when it has been written there."""

    values: torch.Tensor
    buffer: torch.Tensor
    device: torch.device
    written: Mark


@dataclass(eq=False)
class Kept:
    """Inputs of one layer, by their place among these.

    Attributes:
        on_device: until they leave, and once they come back.
        on_host: in between.
        arrived: when they are back.
        previous: those of the layer before, which are needed next.
    """

    on_device: dict[int, torch.Tensor]
    previous: Kept | None
    on_host: dict[int, Copy] = field(default_factory=dict)
    arrived: list[Mark] = field(default_factory=list)
    places: frozenset[int] = frozenset()

    def __contains__(self, place: int) -> bool:
        return place in self.places


class HostInputs:
    """Keeps inputs of one stage's layers in the host's memory. The last of a forward pass stay on the device, since
    they are needed first.

    Args:
        outward, homeward: copy to the host and back; default: as fits the device.
        smallest: in bytes; smaller tensors are left where they are.
    """

    def __init__(
        self, outward: Transfers | None = None, homeward: Transfers | None = None, *, smallest: int = SMALLEST
    ):
        self._outward, self._homeward, self._smallest = outward, homeward, smallest
        self._last: Kept | None = None
        self._spare: list[HostBuffer] = []

    def begin(self) -> None:
        """The next layer is the first of a forward pass."""
        self._last = None

    def keep(self, inputs: Mapping[int, torch.Tensor]) -> Kept:
        """Takes a layer's inputs, of which no later layer has need, once the layer has run. What is left out of the
        answer is not kept here."""
        chosen = {place: tensor for place, tensor in inputs.items() if tensor.nbytes >= self._smallest}
        if self._last is not None:
            self._send(self._last)
        self._last = Kept(chosen, self._last, places=frozenset(chosen))
        return self._last

    def bring(self, kept: Kept) -> dict[int, torch.Tensor]:
        """The inputs, on which computation that is asked for from now on may rely. Can be had once."""
        self._last = None
        self._fetch(kept)
        if kept.previous is not None:
            self._fetch(kept.previous)
            kept.previous = None
        for mark in kept.arrived:
            self._homeward.wait(mark)
        inputs, kept.on_device = kept.on_device, {}
        return inputs

    def _send(self, kept: Kept) -> None:
        for place, tensor in kept.on_device.items():
            self._outward = self._outward or transfers_to(tensor.device)
            memory, free = self._buffer(tensor)
            values = memory[: tensor.nbytes].view(tensor.dtype).as_strided(tensor.shape, dense_strides(tensor))
            written = self._outward.copy(values, tensor.detach(), self._outward.computed(), free)
            kept.on_host[place] = Copy(values, memory, tensor.device, written)
        kept.on_device = {}

    def _fetch(self, kept: Kept) -> None:
        for place, (values, memory, device, written) in kept.on_host.items():
            self._homeward = self._homeward or transfers_to(device)
            tensor = torch.empty_strided(values.shape, values.stride(), dtype=values.dtype, device=device)
            arrived = self._homeward.copy(tensor, values, self._homeward.computed(), written)
            kept.on_device[place] = tensor
            kept.arrived.append(arrived)
            self._spare.append(HostBuffer(memory, arrived))
        kept.on_host = {}

    def _buffer(self, tensor: torch.Tensor) -> HostBuffer:
        """The smallest spare buffer that is large enough; else a new one in the place of a smaller one, so that there
        are never more than were needed at once."""
        self._spare.sort(key=lambda buffer: buffer.memory.nbytes)
        fitting = next((at for at, buffer in enumerate(self._spare) if buffer.memory.nbytes >= tensor.nbytes), None)
        if fitting is not None:
            return self._spare.pop(fitting)
        if self._spare:
            # Nothing may still be read from it when it is given up.
            self._homeward.finish(self._spare.pop().free)
        return HostBuffer(host_memory(tensor.nbytes, pinned=tensor.is_cuda))
