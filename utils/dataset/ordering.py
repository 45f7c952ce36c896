"""The order of training samples: a pure function of sizes, seed and epoch.

A slot is one micro-batch for every data rank, taken from one group of samples of one shape so that all ranks do equal
work; a step has `accumulation` slots of any groups. No sample is left out of an epoch. Incomplete slots and steps are
filled with samples of the same epoch, which are counted. Within a group, the order is the same for any number of data
ranks, and no sample is repeated before all of them have appeared.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from utils.diffusion.seeds import permutation


@dataclass(frozen=True)
class Group:
    """The number of samples of one shape in an epoch, and in one forward pass."""

    size: int
    micro_batch: int

    def slots(self, data_ranks: int) -> int:
        return math.ceil(self.size / (self.micro_batch * data_ranks))

    def fill(self, data_ranks: int) -> int:
        """The number of samples that the last slot lacks."""
        return -self.size % (self.micro_batch * data_ranks)


@dataclass(frozen=True, slots=True)
class Slot:
    """Micro-batches of one group, one for each data rank.

    `samples` are positions within group number `group`: those of data rank 0, then those of rank 1, and so on. The last
    `fill` of them appear elsewhere in this epoch as regular samples.
    """

    group: int
    samples: tuple[int, ...]
    micro_batch: int
    fill: int = 0

    def of_rank(self, data_rank: int) -> tuple[int, ...]:
        """The samples of one data rank."""
        return self.samples[data_rank * self.micro_batch : (data_rank + 1) * self.micro_batch]


Step = tuple[Slot, ...]


def steps_per_epoch(groups: Iterable[Group], data_ranks: int, accumulation: int) -> int:
    """Length of `EpochOrder`."""
    return math.ceil(sum(group.slots(data_ranks) for group in groups) / accumulation)


class EpochOrder:
    """The steps of an epoch. Each sample has exactly one regular position.

    A group's last slot is filled with the first samples of its order, which differ from those that it holds unless the
    group is smaller than a slot. The last step is completed with the first slots of the epoch.
    """

    def __init__(self, groups: Sequence[Group], data_ranks: int, accumulation: int, seed: int, epoch: int) -> None:
        self._groups, self._data_ranks, self._accumulation = groups, data_ranks, accumulation
        # Numbers only; slots are made on demand, since an epoch may have a million.
        self._orders = [
            np.array(permutation(group.size, seed, "order", epoch, number), dtype=np.int64)
            for number, group in enumerate(groups)
        ]
        counts = [group.slots(data_ranks) for group in groups]
        in_turn = np.repeat(np.arange(len(groups)), counts)
        self._group_of = in_turn[permutation(len(in_turn), seed, "slots", epoch)]
        # Groups are mixed, but the slots of each group keep their order, so that the filled one comes last.
        self._number_in_group = np.empty_like(self._group_of)
        firsts = np.cumsum([0, *counts[:-1]], dtype=np.int64)
        self._number_in_group[np.argsort(self._group_of, kind="stable")] = np.arange(len(in_turn)) - firsts[in_turn]

    def __len__(self) -> int:
        return math.ceil(len(self._group_of) / self._accumulation)

    def __iter__(self) -> Iterator[Step]:
        return map(self.step, range(len(self)))

    def step(self, index: int) -> Step:
        """Step number `index`, from 0."""
        assert 0 <= index < len(self), index
        start = index * self._accumulation
        return tuple(self._slot(position) for position in range(start, start + self._accumulation))

    def _slot(self, position: int) -> Slot:
        if position >= len(self._group_of):
            again = self._slot(position % len(self._group_of))
            return replace(again, fill=len(again.samples))
        number = int(self._group_of[position])
        order, micro_batch = self._orders[number], self._groups[number].micro_batch
        size = micro_batch * self._data_ranks
        start = int(self._number_in_group[position]) * size
        own = order[start : start + size]
        fill = size - len(own)
        return Slot(number, (*own.tolist(), *np.resize(order, fill).tolist()), micro_batch, fill)
