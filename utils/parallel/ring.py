"""Blocks whose weights are not on the device, or not all of them, and the buffers of the device through which they
pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.distributed as dist

from utils.parallel.swap_plan import BUFFERS, Swappable
from utils.parallel.transfers import Mark, Transfers, aligned, dense_strides


class Form(NamedTuple):
    """What a tensor is, beside its values."""

    dtype: torch.dtype
    shape: torch.Size
    strides: tuple[int, ...]
    nbytes: int


class Block:
    """Tensors of one block that lie in one piece where they are used, and have a home where they are not.

    Args:
        tensors: of the block; whoever has taken their values lets them be those at home, or calls `give_up`.

    Attributes:
        size: the bytes of the piece.
        home: what is kept of it, uint8.
        on_host: whether that is in the host's memory.
    """

    home: torch.Tensor
    on_host: bool = True

    def __init__(self, tensors: Sequence[Swappable]):
        self._forms = [Form(t.dtype, t.shape, dense_strides(t), t.nbytes) for t in (one.tensor for one in tensors)]
        self.size = sum(aligned(form.nbytes) for form in self._forms)
        self._tensors = [one.tensor for one in tensors]
        self._places = [one.places for one in tensors]
        self._at_home: list[torch.Tensor] = []

    def start(self, device: torch.device, group: dist.ProcessGroup | None) -> None:
        """Follows once the module has been moved to the device, on which is now what is to be there.

        Args:
            group: of the stage's data ranks.
        """
        self.install()

    def bring(self, transfers: Transfers, memory: torch.Tensor, *after: Mark | None) -> Mark:
        """Starts to write the tensors' values into the device's `memory` (size,), as soon as these are reached; when
        that is done."""
        raise NotImplementedError

    def take_from(self, memory: torch.Tensor) -> None:
        """Copies the tensors' own values into memory for all of them."""
        for tensor, view in zip(self._tensors, self.views(memory), strict=True):
            view.copy_(tensor.detach())

    def give_up(self) -> None:
        """The tensors' memory; until `install`, so that nothing is moved to the device with the module."""
        self.point_at([torch.empty(0, dtype=form.dtype) for form in self._forms])

    def views(self, memory: torch.Tensor) -> list[torch.Tensor]:
        """The tensors, in memory that has a copy of the block."""
        views, start = [], 0
        for dtype, shape, strides, nbytes in self._forms:
            view = memory[start : start + nbytes].view(dtype).as_strided(shape, strides)
            # `.data`, so that it counts its own changes: another copy into the memory is none of autograd's business.
            views.append(view.data)
            start += aligned(nbytes)
        return views

    def point_at(self, views: Sequence[torch.Tensor]) -> None:
        """Lets the block's parameters and buffers be these."""
        for tensor, view in zip(self._tensors, views, strict=True):
            tensor.data = view

    def return_home(self) -> None:
        """Lets them be those at home."""
        self.point_at(self._at_home)

    def install(self) -> None:
        """Puts them back into their modules, in which other objects stand for buffers after a move to a device."""
        for tensor, places in zip(self._tensors, self._places, strict=True):
            for table, name in places:
                table[name] = tensor
        self.return_home()


class HostBlock(Block):
    """A block in one piece of the host's memory, so that one copy brings it. It has no home until `move_into`."""

    def move_into(self, memory: torch.Tensor, start: int = 0) -> None:
        """Lets its tensors be those in this memory of the host, uint8, which has their values from `start` on."""
        # Memory is locked as long as its tensor is there.
        self._whole = memory
        self.home = memory[start : start + self.size]
        self._at_home = self.views(self.home)
        self.return_home()

    def bring(self, transfers: Transfers, memory: torch.Tensor, *after: Mark | None) -> Mark:
        """See `Block`."""
        return transfers.copy(memory, self.home, *after)


@dataclass(eq=False)
class Slot:
    """A buffer of the ring.

    Attributes:
        memory: on the device, uint8.
        free: when the computation that read it is done.
        block: whose weights it has, or will have when `ready` is reached.
        ready: None once the computation waits for it.
    """

    memory: torch.Tensor
    free: Mark
    block: int | None = None
    ready: tuple[Mark] | None = None
    views: list[list[torch.Tensor]] = field(default_factory=list)


class Turn(NamedTuple):
    """A pass of a micro-batch through a piece of the stage."""

    forward: bool
    piece: int = 0


class Ring:
    """Keeps the swapped blocks, numbered from 0, in a few buffers of the device.

    Which blocks are wanted next follows from the pass and the one behind it; a block that was not expected is brought
    all the same, and only later.

    Args:
        buffers: how many there are, at most.
        pieces: the blocks of each piece of the stage; default: it has one.

    Attributes:
        current: the block that computes.
        goes_forward: whether a forward pass is under way.
        following: the pass behind the one that is under way; None: the way back, or a new one.
    """

    def __init__(
        self,
        blocks: Sequence[Block],
        transfers: Transfers,
        buffers: int = BUFFERS,
        pieces: Sequence[range] | None = None,
    ):
        self._blocks, self._transfers = blocks, transfers
        self._pieces = pieces or [range(len(blocks))]
        self._piece_of = [piece for piece, numbers in enumerate(self._pieces) for _ in numbers]
        size = max(block.size for block in blocks)
        # The memory may have served computation that is not done yet.
        slots = (Slot(transfers.buffer(size), transfers.computed()) for _ in range(min(buffers, len(blocks))))
        self._slots = list(slots)
        """The longest unused one first."""
        for slot in self._slots:
            slot.views = [block.views(slot.memory) for block in blocks]
        self._by_address = {slot.memory.data_ptr(): slot for slot in self._slots}
        self._held: dict[int, Slot] = {}
        self.current: int | None = None
        self.goes_forward = False
        self._last_copy: tuple[Mark] | None = None
        self._changed: tuple[Mark] | None = None
        """When their homes were written last; None while that may happen."""
        self.following: Turn | None = None
        self._expected: dict[tuple[int, bool, Turn], Sequence[int]] = {}

    @property
    def nbytes(self) -> int:
        """Of the buffers."""
        return sum(slot.memory.nbytes for slot in self._slots)

    @contextmanager
    def forward_pass(self) -> Iterator[None]:
        """A context for a pass from the first block of a piece to its last; outside of it, they are needed from the
        last to the first."""
        self._leave()
        self.goes_forward = True
        try:
            yield
        finally:
            self.goes_forward = False
            self._leave()

    def require(self, block: int) -> Slot:
        """The buffer with the weights of `block`, on which computation that is asked for from now on may rely until
        another block is required or this one is released. The block's parameters are in it."""
        if block != self.current:
            self._leave()
            self._bring((block, *self._after(block)[: len(self._slots) - 1]))
            slot = self._held[block]
            self._slots.append(self._slots.pop(self._slots.index(slot)))
            if slot.ready is not None:
                self._transfers.wait(*slot.ready)
                slot.ready = None
            self.current = block
        return self._held[block]

    def settle(self) -> None:
        """Empties the buffers; the parameters are those at home, which may be written until a block is required."""
        self._leave()
        self._changed = None
        if self._last_copy is not None:
            self._transfers.finish(*self._last_copy)
            self._last_copy = None
        for slot in self._slots:
            if slot.block is not None:
                self._blocks[slot.block].return_home()
            slot.block = slot.ready = None
        self._held.clear()

    def release(self, block: int) -> None:
        """All computation with the weights of `block` has been asked for that this pass needs."""
        self._leave()
        self._bring(self._after(block)[: len(self._slots)])

    def slot_of(self, tensor: torch.Tensor) -> Slot | None:
        """The buffer in which a tensor lies."""
        return self._by_address.get(tensor.untyped_storage().data_ptr())

    def _after(self, block: int) -> Sequence[int]:
        """What is expected after a block: the rest of its piece, then the piece of the pass behind it, then others."""
        piece = self._piece_of[block]
        following = self.following
        if following is None:
            turns_round = self.goes_forward and torch.is_grad_enabled()
            following = Turn(forward=False, piece=piece) if turns_round else Turn(forward=True)
        key = block, self.goes_forward, following
        if key not in self._expected:
            numbers, then = self._pieces[piece], self._pieces[following.piece]
            left = range(block + 1, numbers.stop) if self.goes_forward else reversed(range(numbers.start, block))
            behind = then if following.forward else reversed(then)
            self._expected[key] = tuple(dict.fromkeys((*left, *behind, *range(len(self._blocks)))))
        return self._expected[key]

    def _leave(self) -> None:
        if self.current is not None:
            self._held[self.current].free = self._transfers.computed()
            self.current = None

    def _bring(self, wanted: Sequence[int]) -> None:
        """Starts the copies of those blocks that are not there, in this order, over blocks that are not wanted."""
        missing = [block for block in dict.fromkeys(wanted) if block not in self._held]
        spare = [slot for slot in self._slots if slot.block not in wanted]
        for block, slot in zip(missing, spare, strict=False):
            self._load(block, slot)

    def _load(self, block: int, slot: Slot) -> None:
        if slot.block is not None:
            self._blocks[slot.block].return_home()
            del self._held[slot.block]
        if self._changed is None:
            self._changed = (self._transfers.computed(),)
        one = self._blocks[block]
        mark = one.bring(self._transfers, slot.memory[: one.size], slot.free, *self._changed)
        slot.ready = self._last_copy = (mark,)
        slot.block = block
        self._held[block] = slot
        one.point_at(slot.views[block])
