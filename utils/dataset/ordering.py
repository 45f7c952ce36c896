"""In which order samples are trained on: a pure function of sizes, seed and epoch.

A slot is one micro-batch of every data rank, cut from one bucket so that all ranks do equal work; a step is
`accumulation` slots. No sample is left out of an epoch. What is missing to whole slots and whole steps is
filled with samples of the same epoch, and counted.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from utils.diffusion.seeds import permutation

Item = TypeVar("Item")


@dataclass(frozen=True)
class Slot:
    """Micro-batches of one bucket, one for each data rank.

    `samples` are positions within bucket number `bucket`: those of data rank 0, then those of rank 1, and so
    on. The last `fill` of them appear elsewhere in this epoch, where they are no fill.
    """

    bucket: int
    samples: tuple[int, ...]
    fill: int = 0

    def of_rank(self, data_rank: int, micro_batch: int) -> tuple[int, ...]:
        """The samples of one data rank."""
        return self.samples[data_rank * micro_batch : (data_rank + 1) * micro_batch]


Step = tuple[Slot, ...]


@dataclass(frozen=True)
class Fill:
    """How much of an epoch is there a second time: samples that complete slots, and slots that complete the
    last step."""

    samples: int
    slots: int


def steps_per_epoch(bucket_sizes: Iterable[int], micro_batch: int, data_ranks: int, accumulation: int) -> int:
    """Length of `epoch_order`."""
    slots = sum(math.ceil(size / (micro_batch * data_ranks)) for size in bucket_sizes)
    return math.ceil(slots / accumulation)


def epoch_order(
    bucket_sizes: Sequence[int], micro_batch: int, data_ranks: int, accumulation: int, seed: int, epoch: int
) -> list[Step]:
    """The steps of an epoch. Each sample is in exactly one place that is no fill.

    A bucket's last slot is filled with the samples that its order begins with: with others than it holds,
    unless the bucket is smaller than a slot. The last step is completed with the slots that the epoch begins
    with.
    """
    orders = [permutation(size, seed, "order", epoch, bucket) for bucket, size in enumerate(bucket_sizes)]
    slot_size = micro_batch * data_ranks
    slots = [slot for bucket, order in enumerate(orders) for slot in _slots(bucket, order, slot_size)]
    order = [slots[index] for index in permutation(len(slots), seed, "slots", epoch)]
    missing = -len(order) % accumulation
    order += [Slot(slot.bucket, slot.samples, len(slot.samples)) for slot in _cycled(order, missing)]
    return [tuple(order[start : start + accumulation]) for start in range(0, len(order), accumulation)]


def count_fill(steps: Iterable[Step]) -> Fill:
    """What of the steps is fill."""
    slots = [slot for step in steps for slot in step]
    again = [slot for slot in slots if slot.fill == len(slot.samples)]
    return Fill(sum(slot.fill for slot in slots if slot.fill < len(slot.samples)), len(again))


def _slots(bucket: int, order: list[int], slot_size: int) -> list[Slot]:
    """A bucket's samples, in their order, cut into slots."""
    fill = -len(order) % slot_size
    filled = order + _cycled(order, fill)
    parts = [tuple(filled[start : start + slot_size]) for start in range(0, len(filled), slot_size)]
    return [Slot(bucket, part) for part in parts[:-1]] + [Slot(bucket, part, fill) for part in parts[-1:]]


def _cycled(items: list[Item], count: int) -> list[Item]:
    """The first `count` of the items, begun again as often as needed."""
    return [items[index % len(items)] for index in range(count)]
