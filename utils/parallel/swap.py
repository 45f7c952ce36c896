"""Block swap: the weights of some of a stage's blocks live in the host's memory, or are divided among data ranks.

They travel to the device into a ring of two buffers that the swapped blocks share, and ahead of their use: while one
block computes, the next one's weights arrive. Beside an adapter only frozen weights do so, and what is trained stays on
the device. In a full fine-tune the trained weights travel too, their gradients come back (`host_gradients.py`), and the
optimizer steps where they live. Divided weights (`divided.py`) are gathered where others are copied, of all blocks; the
gradients of trained ones go to their owners (`sharding.py`).

What autograd keeps for the backward pass may be weights too, and these are overwritten before it comes. It keeps a
`Place` in their stead, by which they are brought again (`torch.autograd.graph.saved_tensors_hooks`). A block that is
recomputed asks for its weights when it runs again.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from utils.device_memory import lacks_memory, size_text
from utils.parallel.homes import BlockHomes
from utils.parallel.host_gradients import HostGradients
from utils.parallel.ring import Ring, Turn
from utils.parallel.transfers import Transfers, give_back_freed, transfers_to
from utils.ranks import largest

logger = logging.getLogger(__name__)


class Place(NamedTuple):
    """A tensor that lies in a swapped block's memory, wherever that is; `offset` is in elements."""

    block: int
    dtype: torch.dtype
    shape: torch.Size
    strides: tuple[int, ...]
    offset: int


class BlockSwap:
    """The swapped blocks of one stage. Once their homes are complete they give up what memory they have in the layers,
    so that they are not moved to the device with the rest; `start` follows once that has happened.

    Args:
        homes: of the blocks; all others are left alone.
        resident_in_evaluation: in `evaluation` all blocks are on the device, if there is room.

    Attributes:
        going_back: is called when the backward pass comes to a block, with the position of its layer.
    """

    def __init__(self, homes: BlockHomes | None = None, *, resident_in_evaluation: bool = False):
        homes = homes or BlockHomes()
        self._pinned, self._resident_in_evaluation = homes.pinned, resident_in_evaluation
        self._number_of_blocks, self._division = homes.number_of_blocks, homes.division
        self._blocks = list(homes.blocks.values())
        self._trained = [homes.trained[position] for position in homes.blocks]
        self._numbers = {position: number for number, position in enumerate(homes.blocks)}
        self._positions = list(homes.blocks)
        for block in self._blocks:
            block.give_up()
        self._pieces = [range(len(self._blocks))]
        self._turns: deque[Turn] = deque()
        self._ring: Ring | None = None
        self._gradients: HostGradients | None = None
        self.going_back: Callable[[int], None] | None = None

    def divide(self, pieces: Sequence[Sequence[int]]) -> None:
        """Says the positions of the layers of each piece of the stage, in order; by default it has one."""
        ends = list(accumulate(sum(position in piece for position in self._positions) for piece in pieces))
        self._pieces = [range(start, stop) for start, stop in zip([0, *ends], ends, strict=False)]

    def begin_turns(self, turns: Iterable[Turn]) -> None:
        """Says which passes of the stage are to come."""
        self._turns = deque(turns if self._blocks else ())

    def begin_turn(self) -> None:
        """The first of them begins."""
        if self._ring is None:
            assert not self._blocks, "start() comes first"
            return
        if self._turns:
            self._turns.popleft()
        self._ring.following = self._turns[0] if self._turns else None

    def start(
        self, device: torch.device, group: dist.ProcessGroup | None = None, transfers: Transfers | None = None
    ) -> None:
        """Allocates the buffers on `device`.

        Args:
            group: of the stage's data ranks, among which weights may be divided.
            transfers: default: as fits the device.
        """
        if not self._blocks:
            return
        for block in self._blocks:
            block.start(device, group)
        give_back_freed()
        self._transfers = transfers or transfers_to(device)
        self._ring = Ring(self._blocks, self._transfers, pieces=self._pieces)
        if any(self._trained) and not self._division:
            both_ways = transfers_to(device), transfers_to(device)
            self._gradients = HostGradients(self._trained, *both_ways, pinned=self._pinned)
        self._tell()

    def _tell(self) -> None:
        """Says what is where."""
        kept, on_host = (
            size_text(sum(block.home.nbytes for block in blocks))
            for blocks in (self._blocks, [block for block in self._blocks if block.on_host])
        )
        buffers = f"{size_text(self._ring.nbytes)} of buffers on the device"
        blocks = f"{len(self._blocks)} of the stage's {self._number_of_blocks} blocks"
        if not self._division:
            logger.info("block swap: %s, %s in the host's memory, %s", blocks, on_host, buffers)
            return
        told = "zero_stage: %s are divided among %d data ranks, %s here, %s of it in the host's memory, %s"
        logger.info(told, blocks, self._division.data_ranks, kept, on_host, buffers)

    @contextmanager
    def forward_pass(self) -> Iterator[None]:
        """A context for the stage's forward pass."""
        self.begin_turn()
        with self._ring.forward_pass() if self._ring else nullcontext():
            yield

    def settle(self) -> None:
        """At the end of a pass after which trained weights may change: they are in the host's memory, and have their
        gradients there."""
        if any(self._trained):
            self._ring.settle()
        if self._gradients is not None:
            self._gradients.settle()

    @property
    def late_gradients(self) -> list[torch.Tensor]:
        """The parameters whose gradients are there only once this has settled."""
        return [parameter for block in self._trained for parameter in block] if self._gradients else []

    @property
    def needs_all_ranks(self) -> bool:
        """Whether a forward pass is one of all data ranks; see `hand_in_hand`."""
        return bool(self._division and self._blocks)

    @contextmanager
    def hand_in_hand(self) -> Iterator[None]:
        """A context in which data ranks evaluate each as much as it has to, and which all of them enter and leave
        together."""
        yield
        while self.needs_all_ranks and (passes := self._most(0)):
            with self._in_evaluation():
                self._pass_by(passes)

    @contextmanager
    def evaluation(self, passes: int) -> Iterator[None]:
        """A context for so many forward passes without backward ones."""
        others = self._most(passes) - passes if self.needs_all_ranks else 0
        with self._in_evaluation():
            yield
            self._pass_by(others)

    def _most(self, passes: int) -> int:
        """Of the passes that each data rank has to make."""
        return int(largest([passes])[0])

    def _pass_by(self, passes: int) -> None:
        """Takes part in passes of other data ranks, without any computation."""
        for _ in range(passes):
            with torch.no_grad(), self._ring.forward_pass():
                for number in range(len(self._blocks)):
                    self._ring.require(number)
                    self._ring.release(number)

    @contextmanager
    def _in_evaluation(self) -> Iterator[None]:
        ring = self._ring
        if ring is not None and self._resident_in_evaluation:
            self._ring = self._with_all_blocks(ring)
        try:
            yield
        finally:
            if self._ring is not ring:
                self._ring.settle()
                self._ring = ring
            self.settle()

    def _with_all_blocks(self, ring: Ring) -> Ring:
        """A ring with a buffer for every block, or this one if there is no room."""
        ring.settle()
        try:
            return Ring(self._blocks, self._transfers, buffers=len(self._blocks), pieces=self._pieces)
        except RuntimeError as error:
            if not lacks_memory(error):
                raise
            self._resident_in_evaluation = False
            logger.warning(
                "disable_block_swap_for_eval: the GPU has no room for all blocks at once; evaluation and samples swap "
                "them as training does"
            )
            return ring

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
        present = partial(self._run_present, number, layer, recomputed)
        if recomputed or not torch.is_grad_enabled():
            stream = run(present)
        else:
            with torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack):
                stream = run(present)
        self._ring.release(number)
        return stream

    def _run_present(self, number: int, layer: nn.Module, recomputed: bool, stream: Any) -> Any:
        self._ring.require(number)
        if recomputed and not self._ring.goes_forward:
            self._expect_gradients(number)
        return layer(stream)

    def _expect_gradients(self, number: int) -> None:
        if self._gradients is not None:
            self._gradients.expect(number)
        if self.going_back is not None:
            self.going_back(self._positions[number])

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor | Place:
        slot = self._ring.slot_of(tensor)
        if slot is None:
            # Detached, since an output that is kept for its own gradient would be held by itself for ever.
            return tensor.detach()
        return Place(slot.block, tensor.dtype, tensor.shape, tensor.stride(), tensor.storage_offset())

    def _unpack(self, kept: torch.Tensor | Place) -> torch.Tensor:
        if isinstance(kept, torch.Tensor):
            return kept
        if kept.block != self._ring.current:
            self._expect_gradients(kept.block)
        memory = self._ring.require(kept.block).memory
        return memory.view(kept.dtype).as_strided(kept.shape, kept.strides, kept.offset).data
