"""Gradients of swapped blocks that are trained: they leave the device as soon as autograd has made them.

The sums over micro-batches are kept in the host's memory and made on the device, in two buffers that the blocks share:
what earlier micro-batches have added up to comes back while its block computes, is added to, and leaves again while the
next block computes. So a sum has the bits that it would have had on the device, and the host neither adds nor waits
until the step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch

from utils.parallel.swap_plan import BUFFERS
from utils.parallel.transfers import Mark, Transfers, aligned, dense_strides, host_memory


class HostGradients:
    """The gradients of parameters that live in the host's memory, by the block that they belong to.

    Args:
        blocks: the trained parameters of every swapped block, in the host's memory.
        outward, homeward: copy to the host and back.
        pinned: whether the host's memory is locked, for copies from and to a CUDA device.
    """

    def __init__(
        self,
        blocks: Sequence[Sequence[torch.Tensor]],
        outward: Transfers,
        homeward: Transfers,
        *,
        pinned: bool,
    ):
        self._outward, self._homeward = outward, homeward
        self._sums = [_Sums(parameters, pinned=pinned) for parameters in blocks]
        size = max(sums.memory.nbytes for sums in self._sums)
        self._buffers = [_Buffer(outward.buffer(size), outward.computed()) for _ in self._sums[:BUFFERS]]
        """The one with the current block's first."""
        self._current: int | None = None
        self._arrived: tuple[Mark] | None = None
        for block, sums in enumerate(self._sums):
            for index, parameter in enumerate(sums.parameters):
                parameter.register_post_accumulate_grad_hook(partial(self._take, block, index))

    def expect(self, block: int) -> None:
        """The block's backward pass is about to begin: what its gradients have added up to is brought."""
        if block == self._current:
            return
        self._leave()
        self._buffers.append(self._buffers.pop(0))
        buffer, sums = self._buffers[0], self._sums[block]
        if sums.written is not None:
            target = buffer.memory[: sums.memory.nbytes]
            self._arrived = (self._homeward.copy(target, sums.memory, buffer.free, *sums.written),)
        else:
            self._arrived = (buffer.free,)
        self._views = sums.views(buffer.memory)
        self._current = block

    def settle(self) -> None:
        """Gives the parameters, which must be in the host's memory, the sums as their gradients. The next gradient
        begins new sums."""
        self._leave()
        for buffer in self._buffers:
            self._outward.finish(buffer.free)
        for sums in self._sums:
            sums.hand_over()

    def _take(self, block: int, index: int, parameter: torch.Tensor) -> None:
        """Called once autograd has made a gradient."""
        self.expect(block)
        if self._arrived is not None:
            self._homeward.wait(*self._arrived)
            self._arrived = None
        gradient, parameter.grad = parameter.grad, None
        if index in self._sums[block].begun:
            self._views[index].add_(gradient)
        else:
            self._views[index].copy_(gradient)
            self._sums[block].begun.add(index)

    def _leave(self) -> None:
        """The current block's sums go to the host."""
        if self._current is None:
            return
        buffer, sums = self._buffers[0], self._sums[self._current]
        # Without a gradient nothing has waited for what was brought, and there is nothing to take back.
        if self._arrived is None:
            source = buffer.memory[: sums.memory.nbytes]
            buffer.free = self._outward.copy(sums.memory, source, self._outward.computed())
            sums.written = (buffer.free,)
        else:
            buffer.free = self._arrived[0]
        self._current = self._arrived = None


@dataclass(eq=False)
class _Buffer:
    """Memory of the device, uint8, and when it may be written."""

    memory: torch.Tensor
    free: Mark


class _Sums:
    """What the micro-batches of a step have added up to for the parameters of one block.

    Attributes:
        memory: of the host, uint8.
        begun: indices of the parameters that have had a gradient.
        written: when the memory has been; None without any micro-batch.
    """

    def __init__(self, parameters: Sequence[torch.Tensor], *, pinned: bool):
        self.parameters = parameters
        self.memory = host_memory(gradient_bytes(parameters), pinned=pinned)
        self.begun: set[int] = set()
        self.written: tuple[Mark] | None = None

    def views(self, memory: torch.Tensor) -> list[torch.Tensor]:
        """The sums, in memory that has a copy of them."""
        views, start = [], 0
        for parameter in self.parameters:
            dtype = gradient_type(parameter)
            size = parameter.numel() * dtype.itemsize
            view = memory[start : start + size].view(dtype)
            views.append(view.as_strided(parameter.shape, dense_strides(parameter)))
            start += aligned(size)
        return views

    def hand_over(self) -> None:
        """Lets the sums be the parameters' gradients."""
        views = self.views(self.memory)
        for index in self.begun:
            self.parameters[index].grad = views[index]
        self.begun.clear()
        self.written = None


def gradient_type(parameter: torch.Tensor) -> torch.dtype:
    """The type of a parameter's gradient; torch before 2.10 knows no other than the parameter's."""
    return getattr(parameter, "grad_dtype", None) or parameter.dtype


def gradient_bytes(parameters: Sequence[torch.Tensor]) -> int:
    """The bytes of the gradients of a block in one piece."""
    return sum(aligned(parameter.numel() * gradient_type(parameter).itemsize) for parameter in parameters)
