"""Blocks whose weights the data ranks of a stage divide among themselves (ZeRO, Rajbhandari et al. 2020, stage 3).

Each rank keeps a piece of every block, on its device or in the host's memory. Before a block is needed, its pieces are
gathered into a buffer of the ring (`ring.py`), ahead of their use and beside computation, as swapped weights are
copied there. All ranks gather the same blocks in the same order, which follows from the layers that they run.

Frozen weights are cut into equal pieces, wherever a tensor begins. Trained ones are left whole: a rank has those that
it steps (`sharding.py`), so that an optimizer finds parameters as it knows them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.distributed as dist

from utils.parallel.ring import Block, Form
from utils.parallel.swap_plan import Swappable
from utils.parallel.transfers import Mark, Transfers, aligned, host_memory

# Its name until torch 2.12, and since.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@dataclass(frozen=True)
class Division:
    """How the weights of blocks are divided.

    Attributes:
        data_rank, data_ranks: this rank, and among how many.
        owner_of: which of them has a trained weight; None where frozen ones are divided.
    """

    data_rank: int
    data_ranks: int
    owner_of: Callable[[torch.Tensor], int] | None = None

    def ordered(self, tensors: Sequence[Swappable]) -> list[Swappable]:
        """The tensors of a block in the order in which they lie in one piece: by their owners."""
        owner_of = self.owner_of
        return sorted(tensors, key=lambda one: owner_of(one.tensor)) if owner_of else list(tensors)

    def ends(self, tensors: Sequence[Swappable]) -> list[int]:
        """Where each rank's piece of these ends, in bytes."""
        if self.owner_of is None:
            return [piece_bytes(tensors, self.data_ranks) * (rank + 1) for rank in range(self.data_ranks)]
        sizes = [0] * self.data_ranks
        for one in tensors:
            sizes[self.owner_of(one.tensor)] += aligned(one.tensor.nbytes)
        return list(accumulate(sizes))


def piece_bytes(tensors: Sequence[Swappable], data_ranks: int) -> int:
    """The bytes of a rank's piece of a frozen block."""
    return aligned(-(-sum(aligned(one.tensor.nbytes) for one in tensors) // data_ranks))


def bytes_of(tensor: torch.Tensor, form: Form) -> torch.Tensor:
    """A tensor's values, uint8 (its bytes,), in the order in which its copies have them."""
    values = tensor.detach()
    if values.stride() != form.strides:
        values = torch.empty_strided(form.shape, form.strides, dtype=form.dtype).copy_(values)
    return values.as_strided((values.numel(),), (1,)).view(torch.uint8)


class DividedBlock(Block):
    """A block of which this rank keeps a piece. At home are only those parameters that are whole in there; the others
    have no values then: every number is NaN.

    Args:
        tensors: of the block; they give up their own memory.
        on_host: keep the piece in the host's memory.
        pinned: whether that memory is locked, for copies to a CUDA device.
    """

    def __init__(
        self, tensors: Sequence[Swappable], division: Division, *, on_host: bool = False, pinned: bool = False
    ):
        super().__init__(division.ordered(tensors))
        ends = division.ends(tensors)
        self._pieces = list(zip([0, *ends], ends, strict=False))
        self._data_rank, self._even = division.data_rank, division.owner_of is None
        # Equal pieces may be longer than the tensors.
        self.size = ends[-1]
        self.on_host = on_host
        self.home = self._own_piece(pinned=pinned and on_host)
        self._at_home = list(self._views_at_home(self.home.device))
        self.return_home()

    def _own_piece(self, *, pinned: bool) -> torch.Tensor:
        """This rank's part of the tensors' bytes, in the host's memory; the whole block is never made."""
        first, stop = self._pieces[self._data_rank]
        piece, start = host_memory(stop - first, pinned=pinned), 0
        for tensor, form in zip(self._tensors, self._forms, strict=True):
            begin, end = max(first, start), min(stop, start + form.nbytes)
            if begin < end:
                piece[begin - first : end - first] = bytes_of(tensor, form)[begin - start : end - start]
            start += aligned(form.nbytes)
        return piece

    def start(self, device: torch.device, group: dist.ProcessGroup | None) -> None:
        """See `Block`."""
        assert group is not None
        self._group = group
        if not self.on_host:
            self.home = self.home.to(device)
        self._at_home = list(self._views_at_home(device))
        self.install()

    def _views_at_home(self, device: torch.device) -> Iterator[torch.Tensor]:
        first, stop = self._pieces[self._data_rank]
        start = 0
        for form in self._forms:
            if not self._even and first <= start and start + form.nbytes <= stop:
                flat = self.home[start - first : start - first + form.nbytes]
                yield flat.view(form.dtype).as_strided(form.shape, form.strides).data
            else:
                nothing = float("nan") if form.dtype.is_floating_point else 0
                yield torch.tensor(nothing).to(device, form.dtype).expand(form.shape)
            start += aligned(form.nbytes)

    def bring(self, transfers: Transfers, memory: torch.Tensor, *after: Mark | None) -> Mark:
        """See `Block`."""
        return transfers.fill(memory, self._gather, *after)

    def _gather(self, memory: torch.Tensor) -> None:
        start, stop = self._pieces[self._data_rank]
        own = memory[start:stop]
        own.copy_(self.home, non_blocking=True)
        if self._even:
            _all_gather(memory, own, group=self._group)
            return
        for rank, (start, stop) in enumerate(self._pieces):
            if stop > start:
                source = dist.get_global_rank(self._group, rank)
                dist.broadcast(memory[start:stop], source, group=self._group)
