"""The order of training samples: a pure function of sizes, work, seed, epoch and the global batch.

A step is a number of micro-batches, each of samples of one shape. How they are dealt to data ranks and to accumulated
forward passes changes neither which samples a step has nor what they weigh: data ranks meet only when gradients are
reduced. So that no rank waits long for another, a step's micro-batches are of like work as far as there are enough of
them, and are dealt so that the ranks' sums are alike.

No sample is left out of an epoch. An incomplete micro-batch is filled with samples of its group, an incomplete step
with micro-batches of the same epoch; both are counted. Within a group, no sample is repeated before all of them have
appeared, and the order is the same for every global batch, so that the samples that a part of an epoch has had are the
first ones of each group.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from utils.diffusion.seeds import permutation

LIKE = 1.1
"""Micro-batches are of like work if the largest has at most so many times the smallest."""


@dataclass(frozen=True)
class Group:
    """The number of samples of one shape in an epoch, and in one forward pass.

    Attributes:
        work: of one sample, in any unit.
        taken: how many of them the epoch has had under another global batch.
    """

    size: int
    micro_batch: int
    work: float = 1.0
    taken: int = 0

    @property
    def micro_batches(self) -> int:
        """How many of them hold what is not taken."""
        return math.ceil((self.size - self.taken) / self.micro_batch)

    @property
    def fill(self) -> int:
        """The number of samples that the last micro-batch lacks."""
        return (self.taken - self.size) % self.micro_batch

    @property
    def load(self) -> float:
        """The work of one micro-batch."""
        return self.work * self.micro_batch


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Samples of one group: `samples` are positions within group number `group`. The last `fill` of them appear
    elsewhere in this epoch as regular samples."""

    group: int
    samples: tuple[int, ...]
    fill: int = 0


Step = tuple[MicroBatch, ...]


def steps_per_epoch(groups: Iterable[Group], per_step: int) -> int:
    """Length of `EpochOrder`."""
    return math.ceil(sum(group.micro_batches for group in groups) / per_step)


class EpochOrder:
    """The steps of an epoch, each of `per_step` micro-batches. Each sample has exactly one regular position.

    All micro-batches are shuffled. Each joins the next step of its like, and a step's turn comes when it is complete.
    What is left when all have had their turn is sorted by work and cut into the last steps.
    """

    def __init__(self, groups: Sequence[Group], per_step: int, seed: int, epoch: int) -> None:
        self._groups, self._per_step = groups, per_step
        # Numbers only; micro-batches are made on demand, since an epoch may have a million.
        self._orders = [
            np.array(permutation(group.size, seed, "order", epoch, number), dtype=np.int64)
            for number, group in enumerate(groups)
        ]
        counts = [group.micro_batches for group in groups]
        in_turn = np.repeat(np.arange(len(groups)), counts)
        shuffled = in_turn[permutation(len(in_turn), seed, "slots", epoch)]
        self._loads = np.array([group.load for group in groups])
        self._group_of = _in_steps_of_like_work(shuffled, self._loads, per_step)
        # Groups are mixed, but the micro-batches of each keep their order, so that the filled one comes last.
        self._number_in_group = np.empty_like(self._group_of)
        firsts = np.cumsum([0, *counts[:-1]], dtype=np.int64)
        self._number_in_group[np.argsort(self._group_of, kind="stable")] = np.arange(len(in_turn)) - firsts[in_turn]
        self._repeated = self._completing()

    def __len__(self) -> int:
        return math.ceil(len(self._group_of) / self._per_step)

    def __iter__(self) -> Iterator[Step]:
        return map(self.step, range(len(self)))

    def step(self, index: int) -> Step:
        """Step number `index`, from 0."""
        assert 0 <= index < len(self), index
        start = index * self._per_step
        return tuple(self._at(position) for position in range(start, start + self._per_step))

    def taken(self, steps: int) -> list[int]:
        """How many samples of each group are taken once the first `steps` steps are done: the first ones of its
        order."""
        had = np.bincount(self._group_of[: steps * self._per_step], minlength=len(self._groups))
        return [
            min(group.size, group.taken + count * group.micro_batch)
            for group, count in zip(self._groups, had.tolist(), strict=True)
        ]

    def _at(self, position: int) -> MicroBatch:
        if position >= len(self._group_of):
            again = self._at(int(self._repeated[position - len(self._group_of)]))
            return replace(again, fill=len(again.samples))
        number = int(self._group_of[position])
        order, group = self._orders[number], self._groups[number]
        start = group.taken + int(self._number_in_group[position]) * group.micro_batch
        own = order[start : start + group.micro_batch]
        fill = group.micro_batch - len(own)
        return MicroBatch(number, (*own.tolist(), *np.resize(order, fill).tolist()), fill)

    def _completing(self) -> np.ndarray:
        """The positions of the micro-batches that complete the last step: those of other steps whose work is nearest to
        what it has, each once before any comes again; its own if there is no other step."""
        count = len(self._group_of)
        lacking = -count % self._per_step
        if not lacking:
            return np.zeros(0, dtype=np.int64)
        loads = np.log(self._loads[self._group_of])
        begins = count // self._per_step * self._per_step
        others = np.argsort(np.abs(loads[:begins] - loads[begins:].mean()), kind="stable")
        return np.resize(others if len(others) else np.arange(count), lacking)


def _in_steps_of_like_work(shuffled: np.ndarray, loads: np.ndarray, per_step: int) -> np.ndarray:
    """The groups of shuffled micro-batches, brought into the order of the steps.

    Args:
        shuffled: the group of each micro-batch (N,).
        loads: the work of a micro-batch of each group.
    """
    bands = _bands(loads)
    band_of = bands[shuffled]
    whole, left = [], []
    for band in range(bands.max() + 1):
        mine = np.flatnonzero(band_of == band)
        full = len(mine) // per_step * per_step
        whole.append(mine[:full].reshape(-1, per_step))
        left.append(mine[full:])
    steps = np.concatenate(whole)
    in_turn = steps[np.argsort(steps[:, -1])].ravel()
    rest = np.sort(np.concatenate(left))
    rest = rest[np.argsort(-loads[shuffled[rest]], kind="stable")]
    return shuffled[np.concatenate([in_turn, rest])]


def _bands(loads: np.ndarray) -> np.ndarray:
    """For each group the number of its band: groups of like work, from the smallest up."""
    bands = np.zeros(len(loads), dtype=np.int64)
    band, smallest = -1, 0.0
    for number in np.argsort(loads, kind="stable").tolist():
        if band < 0 or loads[number] > LIKE * smallest:
            band, smallest = band + 1, loads[number]
        bands[number] = band
    return bands


def deal(loads: Sequence[float], ranks: int) -> list[list[int]]:
    """The numbers of the micro-batches that each data rank has, as many for each: the largest first, each to the rank
    that has the least work so far.

    Args:
        loads: the work of each micro-batch of a step; their number is a multiple of `ranks`.
    """
    each = len(loads) // ranks
    shares: list[list[int]] = [[] for _ in range(ranks)]
    least = [(0.0, rank) for rank in range(ranks)]
    for number in sorted(range(len(loads)), key=lambda one: -loads[one]):
        work, rank = heapq.heappop(least)
        shares[rank].append(number)
        if len(shares[rank]) < each:
            heapq.heappush(least, (work + loads[number], rank))
    return [sorted(share) for share in shares]
