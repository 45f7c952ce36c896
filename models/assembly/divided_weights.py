"""The bytes of weights that data ranks divide among themselves (`zero_stage = 3`)."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from torch import nn

from utils.parallel.divided import Division
from utils.parallel.sharding import owner_of
from utils.parallel.swap_plan import BUFFERS, SwapPlan


@dataclass(frozen=True)
class DividedWeights:
    """Of a stage's blocks.

    Attributes:
        blocks: how many are divided.
        whole: the bytes that they would take undivided.
        buffers: of the device, through which they pass.
        pieces: on the device, of the rank that has most.
        on_host: the same in the host's memory.
    """

    blocks: int = 0
    whole: int = 0
    buffers: int = 0
    pieces: int = 0
    on_host: int = 0

    @classmethod
    def of(
        cls, plan: SwapPlan, on_host: Collection[int], data_ranks: int, trained: Mapping[str, nn.Parameter]
    ) -> DividedWeights:
        """What a run would keep.

        Args:
            plan: all that is divided.
            on_host: the positions of the blocks whose pieces are in the host's memory.
            trained: what the stage trains, by name; nothing if what is divided is frozen.
        """
        division = Division(0, data_ranks, owner_of(trained, data_ranks) if trained else None)
        device, host, sizes = [0] * data_ranks, [0] * data_ranks, []
        for position, tensors in plan.blocks.items():
            ends = division.ends(tensors)
            sizes.append(ends[-1])
            kept = host if position in on_host else device
            for rank, (start, stop) in enumerate(zip([0, *ends], ends, strict=False)):
                kept[rank] += stop - start
        buffers = min(BUFFERS, len(sizes)) * max(sizes, default=0)
        return cls(len(plan.blocks), plan.tensor_bytes, buffers, max(device), max(host))

    @property
    def saved(self) -> int:
        """The bytes that a rank's device has less."""
        return self.whole - self.buffers - self.pieces
