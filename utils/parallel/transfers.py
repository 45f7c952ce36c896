"""Copies between the host's memory and a device, beside what the device computes: on a CUDA stream of their own, or at
once where the device is the CPU.

A *mark* is a point in the work of the device: what was asked of it before has been done when it is reached.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import mmap
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

logger = logging.getLogger(__name__)

# Allowed in every context of the process: `cudaHostRegisterPortable`.
PORTABLE = 1
ALIGNMENT = 256
"""In bytes: every tensor begins at a multiple of it, as in memory that CUDA gives out."""

Mark = Any


class Transfers(Protocol):
    """Moves tensors in one direction, one after the other. Only `finish` lets the host wait for the device."""

    def buffer(self, size: int) -> torch.Tensor:
        """Memory of the device for `size` bytes, as uint8 (size,)."""

    def copy(self, target: torch.Tensor, source: torch.Tensor, *after: Mark | None) -> Mark:
        """Copies `source` to `target`, of one form, as soon as these are reached; when that is done."""

    def fill(self, target: torch.Tensor, write: Callable[[torch.Tensor], None], *after: Mark | None) -> Mark:
        """Lets `write` write into `target`, memory of the device, as soon as these are reached; when that is done."""

    def computed(self) -> Mark:
        """When all computation is done that has been asked for until now."""

    def wait(self, mark: Mark) -> None:
        """Lets all computation that is asked for from now on wait for `mark`."""

    def finish(self, mark: Mark) -> None:
        """Returns when `mark` is reached."""


class CudaTransfers:
    """Copies on a stream of their own; see `Transfers`. Marks are events."""

    def __init__(self, device: torch.device):
        self._device = device
        self._copies = torch.cuda.Stream(device)

    def buffer(self, size: int) -> torch.Tensor:
        """See `Transfers`."""
        return torch.empty(size, dtype=torch.uint8, device=self._device)

    def copy(self, target: torch.Tensor, source: torch.Tensor, *after: torch.cuda.Event | None) -> torch.cuda.Event:
        """See `Transfers`."""
        with torch.cuda.stream(self._copies):
            self._wait_for(after)
            target.copy_(source, non_blocking=True)
            # Should it be given up while the copy is under way, its memory must not serve others before the copy's end.
            (target if target.is_cuda else source).record_stream(self._copies)
            return self._copies.record_event()

    def fill(
        self, target: torch.Tensor, write: Callable[[torch.Tensor], None], *after: torch.cuda.Event | None
    ) -> torch.cuda.Event:
        """See `Transfers`."""
        with torch.cuda.stream(self._copies):
            self._wait_for(after)
            write(target)
            target.record_stream(self._copies)
            return self._copies.record_event()

    def _wait_for(self, marks: Sequence[torch.cuda.Event | None]) -> None:
        for mark in marks:
            if mark is not None:
                self._copies.wait_event(mark)

    def computed(self) -> torch.cuda.Event:
        """See `Transfers`. In a backward pass the current stream is the one that the forward pass used."""
        return torch.cuda.current_stream(self._device).record_event()

    def wait(self, mark: torch.cuda.Event) -> None:
        """See `Transfers`."""
        torch.cuda.current_stream(self._device).wait_event(mark)

    def finish(self, mark: torch.cuda.Event) -> None:
        """See `Transfers`."""
        mark.synchronize()


class ImmediateTransfers:
    """Copies at once, for a device that computes what it is asked before the next line runs: the CPU."""

    def __init__(self, device: torch.device):
        self._device = device

    def buffer(self, size: int) -> torch.Tensor:
        """See `Transfers`."""
        return torch.empty(size, dtype=torch.uint8, device=self._device)

    def copy(self, target: torch.Tensor, source: torch.Tensor, *after: None) -> None:
        """See `Transfers`."""
        target.copy_(source)

    def fill(self, target: torch.Tensor, write: Callable[[torch.Tensor], None], *after: None) -> None:
        """See `Transfers`."""
        write(target)

    def computed(self) -> None:
        """See `Transfers`."""

    def wait(self, mark: None) -> None:
        """See `Transfers`."""

    def finish(self, mark: None) -> None:
        """See `Transfers`."""


def transfers_to(device: torch.device) -> Transfers:
    """The transfers for this kind of device."""
    return CudaTransfers(device) if device.type == "cuda" else ImmediateTransfers(device)


def aligned(size: int) -> int:
    """A size in bytes, up to where the next tensor may begin."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def dense_strides(tensor: torch.Tensor) -> tuple[int, ...]:
    """The strides of a tensor's copy, in which a dense one keeps its order of dimensions."""
    return torch.empty_like(tensor, device="meta").stride()


def host_memory(size: int, *, pinned: bool) -> torch.Tensor:
    """Memory of the host for `size` bytes, as uint8 (size,), aligned to pages; `pinned`: locked in its place, so that
    CUDA copies from it without the processor's help.

    It is locked as it is: PyTorch's own pinned memory comes in powers of two, which for the blocks of Flux would be 1.6
    times as much. Where CUDA cannot do so, that is what there is.
    """
    allocated = torch.empty(_in_pages(size) + mmap.PAGESIZE, dtype=torch.uint8)
    start = -allocated.data_ptr() % mmap.PAGESIZE
    memory = allocated[start : start + size]
    if not pinned or not size or lock(memory):
        return memory
    logger.warning("powers of two are allocated instead")
    return torch.empty(size, dtype=torch.uint8, pin_memory=True)


def give_back_freed() -> None:
    """Lets the system have what this process has freed of the host's memory, which the C library keeps for what may be
    asked for later. Only glibc knows how."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def lock(memory: torch.Tensor) -> bool:
    """Locks memory that begins with a page in its place, as long as the tensor is there; whether CUDA can do so."""
    runtime, address = torch.cuda.cudart(), memory.data_ptr()
    error = int(runtime.cudaHostRegister(address, _in_pages(memory.nbytes), PORTABLE))
    if error:
        logger.warning("CUDA cannot lock memory in its place (error %d)", error)
        _forget_error()
        return False
    # At the end of the process its memory is given back as a whole, which is faster.
    weakref.finalize(memory, runtime.cudaHostUnregister, address).atexit = False
    return True


def _in_pages(size: int) -> int:
    """The bytes of whole pages, since only these can be locked."""
    return -(-size // mmap.PAGESIZE) * mmap.PAGESIZE


def _forget_error() -> None:
    """The next computation would tell the last error of CUDA, which is dealt with, as its own."""
    with contextlib.suppress(RuntimeError):
        torch.zeros(1, device="cuda")
