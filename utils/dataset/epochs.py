"""The epochs of a training set: which samples each has, how often, and in which steps. Pure functions of the
settings."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import numpy as np

from utils.dataset.buckets import by_shape, rules_of
from utils.dataset.ordering import EpochOrder, Group, Slot, steps_per_epoch
from utils.dataset.samples import Bucket, Sample, appearances_before, repeat_phase
from utils.errors import UserError
from utils.settings.schema import Settings

Appearance = tuple[Sample, int]
"""A sample, and how many times it has appeared in this epoch before."""


@dataclass(frozen=True)
class BucketLine:
    """The share of an epoch that the samples of one shape have.

    A batch covers all data ranks; `fill` counts the samples that are repeated to complete batches. In the line of the
    total, `name` is empty and the samples that complete the last step count too.
    """

    name: str
    frames: int
    files: int
    samples: int
    repeats: float
    batches: int
    fill: int


def micro_batch_of(settings: Settings, bucket: Bucket, *, evaluating: bool = False) -> int:
    """The number of samples in one forward pass at this size: that of the nearest listed size."""
    is_image = bucket.frames == 1
    sizes = (is_image and settings.image_micro_batch_size_per_gpu) or settings.micro_batch_size_per_gpu
    if evaluating:
        of_images = is_image and settings.eval_image_micro_batch_size_per_gpu
        sizes = of_images or settings.eval_micro_batch_size_per_gpu or sizes
    if isinstance(sizes, int):
        return sizes
    side = math.sqrt(bucket.width * bucket.height)
    return min(sizes, key=lambda entry: abs(math.log(entry[0] / side)))[1]


@dataclass(frozen=True)
class _Schedule:
    """How often and when the samples of a group are used: arrays with a number for every sample."""

    repeats: np.ndarray
    phases: np.ndarray
    epochs: np.ndarray
    """(first, end) epochs, from 0."""
    steps: np.ndarray
    """(first, end) of the steps at which an epoch may begin."""

    @classmethod
    def of(cls, samples: Sequence[Sample], seed: int) -> _Schedule:
        repeats = np.array([sample.repeats for sample in samples], dtype=float)
        phases = np.zeros(len(samples))
        for number in np.flatnonzero(repeats % 1).tolist():
            phases[number] = repeat_phase(samples[number], seed)
        rules = rules_of(samples)
        numbers = {id(one): number for number, one in enumerate(rules)}
        own = np.array([numbers[id(sample.rules)] for sample in samples])
        epochs = np.array([(one.start_epoch - 1, one.end_epoch or math.inf) for one in rules])
        steps = np.array([(one.start_step, one.end_step or math.inf) for one in rules])
        return cls(repeats, phases, epochs[own], steps[own])

    @property
    def is_uniform(self) -> bool:
        """Whether all epochs have the same samples, so that they need not be counted one by one."""
        always = [np.all(bounds == (0, math.inf)) for bounds in (self.epochs, self.steps)]
        return all(always) and not np.any(self.repeats % 1)

    def counts(self, epoch: int, begins: int) -> np.ndarray:
        """How often each sample appears in an epoch that begins at the given step."""
        before, after = (appearances_before(self.repeats, self.phases, number) for number in (epoch, epoch + 1))
        used = _within(epoch, self.epochs) & _within(begins, self.steps)
        return np.where(used, after - before, 0).astype(np.int64)


def _within(number: int, bounds: np.ndarray) -> np.ndarray:
    return (bounds[:, 0] <= number) & (number < bounds[:, 1])


@dataclass(frozen=True)
class Positions:
    """The positions of the samples of a micro-batch among all samples of their step, and among those of their epoch.

    The position in an epoch does not depend on the layout; a sample that is repeated to fill a batch keeps it.

    Attributes:
        step: number of the step in its epoch.
        in_step, in_epoch: the position of each sample, from 0.
        of_step, of_epoch: the number of positions.
    """

    step: int
    in_step: Sequence[int]
    of_step: int
    in_epoch: Sequence[int]
    of_epoch: int


class _Epoch(NamedTuple):
    """An epoch: for each group the position of each sample's first appearance, and the position of the group in the
    epoch; the number of all positions, and their order."""

    begins: list[np.ndarray]
    firsts: list[int]
    size: int
    order: EpochOrder


class Epochs:
    """All epochs of a run, the same on all ranks; epochs, steps and samples are counted from 0. Several threads may use
    it at once.

    Args:
        micro_batch: samples of one forward pass, by bucket.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        micro_batch: Callable[[Bucket], int],
        data_ranks: int,
        accumulation: int,
        seed: int,
    ) -> None:
        self._groups = list(by_shape(samples).values())
        self._micro_batches = [micro_batch(group[0].bucket) for group in self._groups]
        self._data_ranks, self._accumulation, self._seed = data_ranks, accumulation, seed
        self._schedules = [_Schedule.of(group, seed) for group in self._groups]
        self._is_uniform = all(schedule.is_uniform for schedule in self._schedules)
        self._lock = threading.RLock()
        self._first_steps = [0]
        self._opened: dict[int, _Epoch] = {}

    def steps_in(self, epoch: int) -> int:
        """The number of steps of an epoch."""
        return self.first_step(epoch + 1) - self.first_step(epoch)

    def first_step(self, epoch: int) -> int:
        """The number of steps before an epoch.

        Raises:
            UserError: one of the epochs before it has no sample.
        """
        with self._lock:
            firsts = self._first_steps
            while len(firsts) <= epoch:
                is_known = self._is_uniform and len(firsts) > 1
                firsts.append(firsts[-1] + (firsts[1] if is_known else self._counted_steps(len(firsts) - 1)))
            return firsts[epoch]

    def step(self, epoch: int, index: int) -> tuple[Slot, ...]:
        """The micro-batches of one step; `samples_of` says which samples they have."""
        return self._open(epoch).order.step(index)

    def samples_of(self, slot: Slot, epoch: int, data_rank: int) -> list[Appearance]:
        """The samples of one data rank's micro-batch."""
        begins, group = self._open(epoch).begins[slot.group], self._groups[slot.group]
        positions = slot.of_rank(data_rank)
        numbers = np.searchsorted(begins, positions, side="right") - 1
        return [
            (group[number], position - int(begins[number]))
            for number, position in zip(numbers.tolist(), positions, strict=True)
        ]

    def positions(self, epoch: int, index: int, data_rank: int) -> list[Positions]:
        """The positions of the samples of each micro-batch in one step of a data rank."""
        opened, slots = self._open(epoch), self.step(epoch, index)
        ends = list(accumulate(len(slot.samples) for slot in slots))
        found = []
        for slot, end in zip(slots, ends, strict=True):
            first = end - len(slot.samples) + data_rank * slot.micro_batch
            in_step = range(first, first + slot.micro_batch)
            in_epoch = [opened.firsts[slot.group] + position for position in slot.of_rank(data_rank)]
            found.append(Positions(index, in_step, ends[-1], in_epoch, opened.size))
        return found

    def examples(self, epoch: int, index: int) -> int:
        """The number of samples in one step, over all data ranks."""
        return sum(len(slot.samples) for slot in self.step(epoch, index))

    def table(self, epoch: int = 0) -> list[BucketLine]:
        """A line for each shape, then one of the total."""
        lines = []
        for group, every in zip(self._sized(epoch), self._groups, strict=True):
            name = " + ".join(f"{bucket.width}x{bucket.height}" for bucket in every[0].shape)
            lines.append(_line(name, every, group.size, group.slots(self._data_ranks), group.fill(self._data_ranks)))
        everything = [sample for group in self._groups for sample in group]
        again = [slot for slot in self.step(epoch, self.steps_in(epoch) - 1) if slot.fill == len(slot.samples)]
        fill = sum(line.fill for line in lines) + sum(slot.fill for slot in again)
        batches = sum(line.batches for line in lines) + len(again)
        return [*lines, _line("", everything, sum(line.samples for line in lines), batches, fill)]

    def _open(self, epoch: int) -> _Epoch:
        """An epoch. The two newest are kept, since batches of the next epoch are read ahead."""
        with self._lock:
            if epoch not in self._opened:
                # Raises if the epoch is empty.
                self.steps_in(epoch)
                groups = self._sized(epoch)
                ends = list(accumulate(group.size for group in groups))
                firsts = [end - group.size for end, group in zip(ends, groups, strict=True)]
                order = EpochOrder(groups, self._data_ranks, self._accumulation, self._seed, epoch)
                begins = [np.cumsum(counts) - counts for counts in self._counts(epoch)]
                self._opened = {number: self._opened[number] for number in sorted(self._opened)[-1:]}
                self._opened[epoch] = _Epoch(begins, firsts, ends[-1], order)
            return self._opened[epoch]

    def _counts(self, epoch: int) -> list[np.ndarray]:
        """How often each sample of each group appears in an epoch."""
        begins = self.first_step(epoch)
        return [schedule.counts(epoch, begins) for schedule in self._schedules]

    def _sized(self, epoch: int) -> list[Group]:
        sizes = [int(counts.sum()) for counts in self._counts(epoch)]
        return [Group(size, micro) for size, micro in zip(sizes, self._micro_batches, strict=True)]

    def _counted_steps(self, epoch: int) -> int:
        steps = steps_per_epoch(self._sized(epoch), self._data_ranks, self._accumulation)
        if not steps:
            raise UserError.of(
                f"epoch {epoch + 1} has no sample at all; let some directory be used in every epoch",
                where="start_epoch, end_epoch, start_step, end_step, num_repeats",
            )
        return steps


def _line(name: str, samples: Sequence[Sample], appearing: int, batches: int, fill: int) -> BucketLine:
    files = {sample.media.locator for sample in samples}
    return BucketLine(
        name, samples[0].bucket.frames if name else 0, len(files), appearing, appearing / len(samples), batches, fill
    )


def format_table(lines: Iterable[BucketLine]) -> str:
    """The table as text, columns aligned."""
    rows: list[tuple] = [("bucket", "frames", "files", "samples", "repeats", "batches", "fill")]
    rows += [
        (
            line.name or "total",
            line.frames or "",
            line.files,
            line.samples,
            f"{line.repeats:.4g}",
            line.batches,
            line.fill,
        )
        for line in lines
    ]
    width = max(len(row[0]) for row in rows) + 2
    text = "\n".join(f"{name:<{width}}" + "".join(f"{cell:>9}" for cell in cells) for name, *cells in rows)
    if any(row[-1] for row in rows[1:]):
        text += "\nfill: how often samples are used once more, so that the last batch of a size is full too"
    return text
