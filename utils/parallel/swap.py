"""Block swap: the frozen weights of some of a stage's blocks live in the host's memory.

They only ever travel to the device, into a ring of two buffers that the swapped blocks share, and ahead of their use:
while one block computes, the next one's weights arrive. Trained parameters stay on the device.

What autograd keeps for the backward pass may be weights too, and these are overwritten before it comes. It keeps a
`Place` in their stead, by which they are brought again (`torch.autograd.graph.saved_tensors_hooks`). A block that is
recomputed asks for its weights when it runs again.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from utils.parallel.partition import repeated_blocks
from utils.parallel.transfers import Mark, Transfers, aligned, dense_strides, host_memory, transfers_to

logger = logging.getLogger(__name__)

GIB = 2**30
BUFFERS = 2
"""One for the block that computes and one for the next. A third would not make the copies any faster."""


def spread(count: int, blocks: int) -> tuple[int, ...]:
    """Which of a stage's blocks are swapped: evenly from the first to the last, so that as much computation as possible
    lies between two of them. At both ends of a pass the last used buffers are those that the pass back begins with, so
    that computation before the first or behind the last one would hide no copy."""
    if count == 1:
        return (0,)
    return tuple(index * (blocks - 1) // (count - 1) for index in range(count))


def counts(setting: int | Sequence[int] | str, layers_of_stages: Sequence[Sequence[nn.Module]]) -> list[int]:
    """The number of swapped blocks of every stage, from one number for all or one for each; 0 as long as they are not
    chosen ("auto").

    Raises:
        ValueError: a stage has fewer blocks.
    """
    if setting == "auto":
        return [0] * len(layers_of_stages)
    numbers = [setting] * len(layers_of_stages) if isinstance(setting, int) else list(setting)
    most = [len(repeated_blocks(layers)) for layers in layers_of_stages]
    for stage, (number, limit) in enumerate(zip(numbers, most, strict=True)):
        if number > limit:
            if len(most) == 1:
                raise ValueError(
                    f"{number} blocks cannot be swapped, since the model has {limit}; swap at most {limit}"
                )
            raise ValueError(
                f"{number} blocks cannot be swapped, since stage {stage} has {limit}; swap at most {min(most)}, or "
                f"write a number for each stage, at most {most}"
            )
    return numbers


class Frozen(NamedTuple):
    """A tensor that is not trained, and the tables of modules in which it stands as a parameter or buffer."""

    tensor: torch.Tensor
    places: tuple[tuple[dict[str, Any], str], ...]


def frozen_tensors(layers: Sequence[nn.Module]) -> list[list[Frozen]]:
    """The tensors of each layer that can leave the device: neither trained nor shared with another layer, and plain,
    since only plain tensors are no more than their bytes."""
    found = [list(_tensors(layer)) for layer in layers]
    users = Counter(key for tensors in found for key in {id(tensor) for tensor, _, _ in tensors})
    frozen: list[list[Frozen]] = []
    for tensors in found:
        places: dict[int, Frozen] = {}
        for tensor, table, name in tensors:
            plain = type(tensor) in (torch.Tensor, nn.Parameter) and not tensor.is_sparse
            if plain and tensor.numel() and not tensor.requires_grad and users[id(tensor)] == 1:
                before = places[id(tensor)].places if id(tensor) in places else ()
                places[id(tensor)] = Frozen(tensor, (*before, (table, name)))
        frozen.append(list(places.values()))
    return frozen


def _tensors(layer: nn.Module) -> Iterator[tuple[torch.Tensor, dict[str, Any], str]]:
    for module in layer.modules():
        for table in (module._parameters, module._buffers):
            yield from ((tensor, table, name) for name, tensor in table.items() if tensor is not None)


@dataclass(frozen=True)
class SwapPlan:
    """What leaves the device.

    Attributes:
        blocks: position of a layer -> its tensors.
    """

    blocks: dict[int, list[Frozen]]

    @classmethod
    def of(cls, layers: Sequence[nn.Module], count: int) -> SwapPlan:
        """For `count` of a stage's layers, which may be on the meta device."""
        return cls.of_all(layers).with_blocks(count) if count else cls({})

    @classmethod
    def of_all(cls, layers: Sequence[nn.Module]) -> SwapPlan:
        """For all blocks."""
        frozen = frozen_tensors(layers)
        return cls({position: frozen[position] for position in repeated_blocks(layers)})

    def with_blocks(self, count: int) -> SwapPlan:
        """For so many of these blocks."""
        positions = list(self.blocks)
        chosen = [positions[index] for index in spread(count, len(positions))] if count else []
        return SwapPlan({position: self.blocks[position] for position in chosen})

    @property
    def sizes(self) -> list[int]:
        """The bytes of every swapped block in the host's memory."""
        return [sum(aligned(frozen.tensor.nbytes) for frozen in tensors) for tensors in self.blocks.values()]

    @property
    def host_bytes(self) -> int:
        """All of them."""
        return sum(self.sizes)

    @property
    def tensor_bytes(self) -> int:
        """The bytes of the tensors without what lies between them."""
        return sum(frozen.tensor.nbytes for block in self.blocks.values() for frozen in block)

    @property
    def ring_bytes(self) -> int:
        """The bytes of the buffers on the device."""
        return min(BUFFERS, len(self.sizes)) * max(self.sizes, default=0)


class HostBlock:
    """The frozen tensors of one block in one piece of the host's memory, so that one copy brings them all.

    Attributes:
        memory: uint8.
    """

    def __init__(self, tensors: Sequence[Frozen], *, pinned: bool):
        self.memory = host_memory(sum(aligned(frozen.tensor.nbytes) for frozen in tensors), pinned=pinned)
        self._forms = [(f.tensor.dtype, f.tensor.shape, dense_strides(f.tensor), f.tensor.nbytes) for f in tensors]
        self._at_home = self.views(self.memory)
        for frozen, view in zip(tensors, self._at_home, strict=True):
            view.copy_(frozen.tensor.detach())
        self._tensors = [f.tensor for f in tensors]
        self._places = [f.places for f in tensors]
        # Until `install`, so that nothing is moved to the device with the module.
        self.point_at([torch.empty(0, dtype=view.dtype) for view in self._at_home])

    def views(self, memory: torch.Tensor) -> list[torch.Tensor]:
        """The tensors, in memory that has a copy of the block."""
        views, start = [], 0
        for dtype, shape, strides, size in self._forms:
            view = memory[start : start + size].view(dtype).as_strided(shape, strides)
            # `.data`, so that it counts its own changes: another copy into the memory is none of autograd's business.
            views.append(view.data)
            start += aligned(size)
        return views

    def point_at(self, views: Sequence[torch.Tensor]) -> None:
        """Lets the block's parameters and buffers be these."""
        for tensor, view in zip(self._tensors, views, strict=True):
            tensor.data = view

    def return_home(self) -> None:
        """Lets them be those in the host's memory."""
        self.point_at(self._at_home)

    def install(self) -> None:
        """Puts them back into their modules, in which other objects stand for buffers after a move to a device."""
        for tensor, places in zip(self._tensors, self._places, strict=True):
            for table, name in places:
                table[name] = tensor
        self.return_home()


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


class Ring:
    """Keeps the swapped blocks, numbered from 0, in a few buffers of the device.

    Which blocks are wanted next follows from the pass; a block that was not expected is brought all the same, and only
    later.
    """

    def __init__(self, blocks: Sequence[HostBlock], transfers: Transfers, buffers: int = BUFFERS):
        self._blocks, self._transfers = blocks, transfers
        size = max(block.memory.nbytes for block in blocks)
        # The memory may have served computation that is not done yet.
        slots = (Slot(transfers.buffer(size), transfers.computed()) for _ in range(min(buffers, len(blocks))))
        self._slots = list(slots)
        """The longest unused one first."""
        for slot in self._slots:
            slot.views = [block.views(slot.memory) for block in blocks]
        self._by_address = {slot.memory.data_ptr(): slot for slot in self._slots}
        self._held: dict[int, Slot] = {}
        self._current: int | None = None
        numbers = range(len(blocks))
        # What is expected after each block; every block once, itself last or where the pass turns round.
        self._in_training = [(*numbers[block + 1 :], *reversed(numbers[: block + 1])) for block in numbers]
        self._in_evaluation = [(*numbers[block + 1 :], *numbers[: block + 1]) for block in numbers]
        self._backward = [(*reversed(numbers[:block]), *numbers[block:]) for block in numbers]
        self._order = self._backward

    @contextmanager
    def forward_pass(self) -> Iterator[None]:
        """A context for a pass from the first block to the last; outside of it, they are needed from the last to the
        first."""
        self._leave()
        self._order = self._in_training if torch.is_grad_enabled() else self._in_evaluation
        try:
            yield
        finally:
            self._leave()
            self._order = self._backward

    def require(self, block: int) -> Slot:
        """The buffer with the weights of `block`, on which computation that is asked for from now on may rely until
        another block is required or this one is released. The block's parameters are in it."""
        if block != self._current:
            self._leave()
            self._bring((block, *self._order[block][: len(self._slots) - 1]))
            slot = self._held[block]
            self._slots.append(self._slots.pop(self._slots.index(slot)))
            if slot.ready is not None:
                self._transfers.wait(*slot.ready)
                slot.ready = None
            self._current = block
        return self._held[block]

    def release(self, block: int) -> None:
        """All computation with the weights of `block` has been asked for that this pass needs."""
        self._leave()
        self._bring(self._order[block][: len(self._slots)])

    def slot_of(self, tensor: torch.Tensor) -> Slot | None:
        """The buffer in which a tensor lies."""
        return self._by_address.get(tensor.untyped_storage().data_ptr())

    def _leave(self) -> None:
        if self._current is not None:
            self._held[self._current].free = self._transfers.computed()
            self._current = None

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
        source = self._blocks[block].memory
        slot.ready = (self._transfers.copy(slot.memory[: source.nbytes], source, slot.free),)
        slot.block = block
        self._held[block] = slot
        self._blocks[block].point_at(slot.views[block])


class Place(NamedTuple):
    """A tensor that lies in a swapped block's memory, wherever that is; `offset` is in elements."""

    block: int
    dtype: torch.dtype
    shape: torch.Size
    strides: tuple[int, ...]
    offset: int


class BlockSwap:
    """The swapped blocks of one stage. Taking them out of the layers comes first, so that they are not moved to the
    device with the rest; `start` follows once that has happened.

    Args:
        layers: of the stage, with their weights on the CPU.
        count: how many blocks are swapped; the others are left alone.
        pinned: whether the host's memory is locked, for copies to a CUDA device.
    """

    def __init__(self, layers: Sequence[nn.Module] = (), count: int = 0, *, pinned: bool = False):
        plan = SwapPlan.of(layers, count)
        self._sizes = plan.host_bytes, plan.ring_bytes, len(repeated_blocks(layers))
        with torch.no_grad():
            blocks = {
                position: HostBlock(tensors, pinned=pinned) for position, tensors in plan.blocks.items() if tensors
            }
        self._blocks = list(blocks.values())
        self._numbers = {position: number for number, position in enumerate(blocks)}
        self._ring: Ring | None = None

    def start(self, device: torch.device, transfers: Transfers | None = None) -> None:
        """Allocates the buffers on `device`."""
        if not self._blocks:
            return
        for block in self._blocks:
            block.install()
        self._ring = Ring(self._blocks, transfers or transfers_to(device))
        host, ring, of = self._sizes
        logger.info(
            "block swap: %d of the stage's %d blocks, %.2f GiB in the host's memory, %.2f GiB of buffers on the device",
            len(self._blocks),
            of,
            host / GIB,
            ring / GIB,
        )

    @contextmanager
    def forward_pass(self) -> Iterator[None]:
        """A context for the stage's forward pass."""
        if self._ring is None:
            assert not self._blocks, "start() comes first"
            yield
        else:
            with self._ring.forward_pass():
                yield

    def run(
        self, position: int, layer: nn.Module, run: Callable[[Callable[[Any], Any]], Any], *, recomputed: bool
    ) -> Any:
        """What `run` makes of the layer at this position of the stage, with the layer's weights in their place.

        Args:
            run: calls what it is given, like the layer, on a stream, and perhaps again in the backward pass.
            recomputed: it will do so, and lets autograd keep nothing of the layer.
        """
        number = self._numbers.get(position)
        if number is None:
            return run(layer)
        present = partial(self._run_present, number, layer)
        if recomputed or not torch.is_grad_enabled():
            stream = run(present)
        else:
            with torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack):
                stream = run(present)
        self._ring.release(number)
        return stream

    def _run_present(self, number: int, layer: nn.Module, stream: Any) -> Any:
        self._ring.require(number)
        return layer(stream)

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor | Place:
        slot = self._ring.slot_of(tensor)
        if slot is None:
            # Detached, since an output that is kept for its own gradient would be held by itself for ever.
            return tensor.detach()
        return Place(slot.block, tensor.dtype, tensor.shape, tensor.stride(), tensor.storage_offset())

    def _unpack(self, kept: torch.Tensor | Place) -> torch.Tensor:
        if isinstance(kept, torch.Tensor):
            return kept
        memory = self._ring.require(kept.block).memory
        return memory.view(kept.dtype).as_strided(kept.shape, kept.strides, kept.offset).data
