"""Memory of the host that processes of one machine share: one of them fills it, the others read."""

from __future__ import annotations

import logging
import mmap
import os
from typing import Any

import torch

from utils.machine import machine, memory_file, path_of
from utils.parallel.transfers import lock
from utils.ranks import Ranks, gather

logger = logging.getLogger(__name__)


class SharedMemory:
    """Memory that some processes have together on each machine, piece by piece: all of them ask for the same pieces in
    the same order, of which one process writes the values. All ranks make one, and complete it together.

    Args:
        ranks: this process.
        name: of what is in it; unique within a run.
        group: the same for processes that share it, if they are on one machine; anything JSON can hold.
        wanted: how many pieces it will ask for, as all of its group do; 0 if none.

    Attributes:
        leads: whether this process writes.
        shared: whether it has a part in the memory; not where no other process of its group is on the machine, or it
            cannot be shared.
    """

    def __init__(self, ranks: Ranks, name: str, group: Any, wanted: int):
        self._ranks, self._name, self._size = ranks, name, 0
        place = [machine(), group, wanted]
        places = gather(ranks, f"{name}: machines", place)
        together = [rank for rank, other in enumerate(places) if other == place and wanted]
        is_alone = len(together) < 2
        self.leads = not is_alone and ranks.rank == together[0]
        self._file = memory_file(name) if self.leads else None
        offers = gather(ranks, f"{name}: offers", [os.getpid(), self._file])
        if not is_alone and not self.leads:
            self._file = self._file_of(*offers[together[0]])
        self.shared = self._file is not None

    def add(self, size: int) -> tuple[int, torch.Tensor | None]:
        """A further piece of so many bytes: where it will begin, and where this process has to write its values, uint8
        (size,); None where another one does so."""
        assert self.shared
        start = self._size
        # Pages are what can be mapped.
        self._size += -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        if not self.leads:
            return start, None
        os.ftruncate(self._file, self._size)
        return start, _mapped(self._file, size, start)

    def complete(self, *, pinned: bool) -> torch.Tensor | None:
        """The memory with all pieces, uint8, once they have been written; None if nothing is shared.

        Args:
            pinned: whether it is to be locked for CUDA, as long as the tensor is there.
        """
        gather(self._ranks, f"{self._name}: all is there", None)
        if self._file is None:
            return None
        memory = _mapped(self._file, self._size) if self._size else None
        os.close(self._file)
        if memory is not None and pinned:
            # Without, it is the same and slower.
            lock(memory)
        return memory

    def _file_of(self, process: int, descriptor: int) -> int | None:
        """A descriptor of our own of the file in memory of another process."""
        try:
            return os.open(path_of(process, descriptor), os.O_RDWR)
        except OSError as error:
            logger.warning("%s take memory once for each process, since it cannot be shared: %s", self._name, error)
            return None


def _mapped(descriptor: int, size: int, start: int = 0) -> torch.Tensor:
    return torch.frombuffer(mmap.mmap(descriptor, size, offset=start), dtype=torch.uint8)
