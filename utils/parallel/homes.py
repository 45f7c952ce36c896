"""Where a stage's blocks live that are not on its device, or not whole: in the host's memory, or divided among data
ranks.

They move there while the stage is loaded: a block that has its weights leaves what it does not keep here before the
next one is read. So no process ever has all of them, if it is not to keep all, and what processes of one machine have
alike is there once at every moment.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from utils.parallel.divided import DividedBlock, Division
from utils.parallel.partition import repeated_blocks
from utils.parallel.ring import Block, HostBlock
from utils.parallel.shared_memory import SharedMemory
from utils.parallel.swap_plan import Swappable, SwapPlan, spread
from utils.parallel.transfers import give_back_freed, host_memory
from utils.ranks import Ranks


class BlockHomes:
    """The blocks of one stage that are swapped or divided. `take` follows for each of `waiting`, once its layer has all
    its tensors and their values, and then `complete`.

    Until a `BlockSwap` has them, their tensors are those at home: of one that is elsewhere every number is NaN, and
    those of memory that is shared are there from `complete` on.

    Args:
        layers: of the stage, with or without weights.
        count: how many blocks are swapped; the others are left alone.
        pinned: whether the host's memory is locked, for copies to a CUDA device.
        trained: trained weights are swapped too.
        ranks: of a run with several data ranks, which share what is frozen where they are on one machine. All of them
            make homes then, and complete them together, with blocks or without.
        division: of the weights of all blocks among the data ranks, which run each pass together; of `count` blocks,
            the pieces are in the host's memory.

    Attributes:
        waiting: the positions of the layers that are still to be taken, in order.
        blocks: position of a layer -> its block.
        trained: position of a layer -> what is trained of the block's tensors.
        number_of_blocks: of the stage.
        pinned, division: as given.
    """

    def __init__(
        self,
        layers: Sequence[nn.Module] = (),
        count: int = 0,
        *,
        pinned: bool = False,
        trained: bool = False,
        ranks: Ranks | None = None,
        division: Division | None = None,
    ):
        every = repeated_blocks(layers)
        swapped = [every[index] for index in spread(count, len(every))] if count else []
        self._layers, self.pinned, self._with_trained = layers, pinned, trained
        self.division, self._on_host = division, set(swapped)
        self.number_of_blocks = len(every)
        self.waiting = list(every if division else swapped)
        self.blocks: dict[int, Block] = {}
        self.trained: dict[int, list[torch.Tensor]] = {}
        shares = ranks is not None and not trained and division is None
        self._memory = SharedMemory(ranks, "swapped blocks", ranks.stage, len(self.waiting)) if shares else None
        self._elsewhere: list[tuple[HostBlock, int]] = []
        """Blocks in memory that is shared, and where they begin."""

    def filled(self) -> BlockHomes:
        """The same, once all that wait are taken, of layers that are loaded already."""
        for position in list(self.waiting):
            self.take(position)
        self.complete()
        return self

    @torch.no_grad()
    def take(self, position: int) -> None:
        """The layer at this position of the stage is loaded; its block moves."""
        self.waiting.remove(position)
        plan_of = SwapPlan.of_divided if self.division else SwapPlan.of_all
        # Of all layers, since what they share stays, and may have come with this one's weights.
        tensors = plan_of(self._layers, trained=self._with_trained).blocks[position]
        if tensors:
            self.trained[position] = [one.tensor for one in tensors if one.tensor.requires_grad]
            self.blocks[position] = self._moved(tensors, on_host=position in self._on_host)
            give_back_freed()

    def _moved(self, tensors: Sequence[Swappable], *, on_host: bool) -> Block:
        if self.division:
            return DividedBlock(tensors, self.division, on_host=on_host, pinned=self.pinned)
        block = HostBlock(tensors)
        if self._memory is not None and self._memory.shared:
            start, memory = self._memory.add(block.size)
            if memory is not None:
                block.take_from(memory)
            block.give_up()
            self._elsewhere.append((block, start))
        else:
            memory = host_memory(block.size, pinned=self.pinned)
            block.take_from(memory)
            block.move_into(memory)
        return block

    @torch.no_grad()
    def complete(self) -> None:
        """All are taken. Waits for the ranks with which memory is shared."""
        assert not self.waiting
        # Some may have been taken before others that come before them.
        self.blocks = dict(sorted(self.blocks.items()))
        if self._memory is not None:
            memory = self._memory.complete(pinned=self.pinned)
            for block, start in self._elsewhere:
                block.move_into(memory, start)
            self._elsewhere.clear()
