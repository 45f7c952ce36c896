"""Memory of the host that processes of one machine share: one of them fills it, the others read."""

from __future__ import annotations

import logging
import mmap
import os
from collections.abc import Callable

import torch

from utils.machine import machine, memory_file, path_of
from utils.parallel.transfers import lock
from utils.ranks import Ranks, gather

logger = logging.getLogger(__name__)


def shared_by_stage(
    ranks: Ranks, size: int, fill: Callable[[torch.Tensor], None], *, pinned: bool
) -> tuple[torch.Tensor, bool] | None:
    """Memory that the data ranks of a stage share on each machine; all ranks call this, with the same `size` on all of
    a stage.

    Args:
        size: in bytes; may be 0.
        fill: writes into the memory, uint8 (size,); called in one of the processes.
        pinned: whether it is to be locked for CUDA, as long as the tensor is there.

    Returns:
        The memory, uint8 (size,), and whether this process filled it. None where no other process of the machine has
        this stage, or it cannot be shared.
    """
    place = [machine(), ranks.stage, size]
    group = [rank for rank, other in enumerate(gather(ranks, "machines", place)) if other == place and size]
    leads, memory = ranks.rank == min(group, default=None), None
    descriptor = None
    try:
        if leads and len(group) > 1:
            descriptor = memory_file("swapped blocks")
            os.ftruncate(descriptor, size)
            memory = _mapped(descriptor, size)
            fill(memory)
        offers = gather(ranks, "swapped blocks", [os.getpid(), descriptor])
        if not leads and len(group) > 1:
            memory = _memory_of(*offers[min(group)], size)
        gather(ranks, "swapped blocks are seen", None)
    finally:
        if descriptor is not None:
            os.close(descriptor)
    if memory is None:
        return None
    if pinned:
        # Without, it is the same and slower.
        lock(memory)
    return memory, leads


def _memory_of(process: int, descriptor: int, size: int) -> torch.Tensor | None:
    try:
        own = os.open(path_of(process, descriptor), os.O_RDWR)
    except OSError as error:
        logger.warning("swapped blocks take memory once for each process, since it cannot be shared: %s", error)
        return None
    try:
        return _mapped(own, size)
    finally:
        os.close(own)


def _mapped(descriptor: int, size: int) -> torch.Tensor:
    return torch.frombuffer(mmap.mmap(descriptor, size), dtype=torch.uint8)
