"""The epochs of a training set: which samples each has, how often, and in which steps. Pure functions of the
settings."""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np

from utils.dataset.bucket_table import BucketLine, line_of
from utils.dataset.buckets import by_shape, rules_of
from utils.dataset.ordering import EpochOrder, Group, MicroBatch, deal, steps_per_epoch
from utils.dataset.samples import Bucket, Sample, appearances_before, repeat_phase
from utils.errors import UserError
from utils.settings.schema import Settings

Shape = tuple[Bucket, ...]
Appearance = tuple[Sample, int]
"""A sample, and how many times it has appeared in this epoch before."""


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

    They do not depend on how a step is dealt to data ranks, and the position in an epoch not even on the global batch;
    a sample that is repeated to fill a batch keeps it.

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


def _pixels(shape: Shape) -> float:
    return float(sum(bucket.pixels for bucket in shape))


class _Epoch(NamedTuple):
    """An epoch: for each group the position of each sample's first appearance, and the position of the group in the
    epoch; the number of all positions, and their order."""

    begins: list[np.ndarray]
    firsts: list[int]
    size: int
    order: EpochOrder


@dataclass(frozen=True)
class Continued:
    """An epoch that was begun with another global batch, or with other data, and goes on with what it has not had.

    Attributes:
        begins: number of the run's step at which the epoch began.
        steps: how many steps of it are done.
        taken: how many samples of each shape they had.
    """

    epoch: int
    begins: int
    steps: int
    taken: Mapping[str, int]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class Epochs:
    """All epochs of a run, the same on all ranks; epochs, steps and samples are counted from 0. Several threads may use
    it at once.

    Args:
        micro_batch: samples of one forward pass, by bucket.
        work: of one sample of a shape, in any unit.
        continued: the epoch at which the run went on otherwise; those before it are no longer asked for.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        micro_batch: Callable[[Bucket], int],
        data_ranks: int,
        accumulation: int,
        seed: int,
        *,
        work: Callable[[Shape], float] = _pixels,
        continued: Continued | None = None,
    ) -> None:
        self._groups = list(by_shape(samples).values())
        self._names = [" + ".join(map(str, group[0].shape)) for group in self._groups]
        self._micro_batches = [micro_batch(group[0].bucket) for group in self._groups]
        self._work = [work(group[0].shape) for group in self._groups]
        self._data_ranks, self._per_step, self._seed = data_ranks, data_ranks * accumulation, seed
        self._schedules = [_Schedule.of(group, seed) for group in self._groups]
        self._is_uniform = all(schedule.is_uniform for schedule in self._schedules)
        self._steps_of_others = 0
        self._lock = threading.RLock()
        self._opened: dict[int, _Epoch] = {}
        self._go_on(continued)

    def _go_on(self, continued: Continued | None) -> None:
        self._continued = continued
        self._first_epoch = continued.epoch if continued else 0
        self._first_steps = [continued.begins if continued else 0]

    def continuing(self, continued: Continued | None) -> Epochs:
        """The same epochs, but going on as `continued` says."""
        epochs = copy.copy(self)
        epochs._lock, epochs._opened = threading.RLock(), {}
        epochs._go_on(continued)
        return epochs

    def steps_in(self, epoch: int) -> int:
        """The number of steps of an epoch."""
        return self.first_step(epoch + 1) - self.first_step(epoch)

    def first_step(self, epoch: int) -> int:
        """The number of steps before an epoch.

        Raises:
            UserError: one of the epochs before it has no sample.
        """
        with self._lock:
            first, firsts = self._first_epoch, self._first_steps
            assert epoch >= first, f"epoch {epoch}, but the run went on in epoch {first}"
            while len(firsts) <= epoch - first:
                firsts.append(firsts[-1] + self._counted_steps(first + len(firsts) - 1))
            return firsts[epoch - first]

    def step(self, epoch: int, index: int) -> tuple[MicroBatch, ...]:
        """The micro-batches of one step, of all data ranks; `samples_of` says which samples they have."""
        return self._open(epoch).order.step(index - self._done_before(epoch))

    def share(self, epoch: int, index: int, data_rank: int) -> list[int]:
        """The numbers, within a step, of the micro-batches that a data rank has."""
        step = self.step(epoch, index)
        return deal([self.work_of(micro_batch) for micro_batch in step], self._data_ranks)[data_rank]

    def work_of(self, micro_batch: MicroBatch) -> float:
        """The work of a micro-batch, in the unit of the samples' work."""
        return self._work[micro_batch.group] * len(micro_batch.samples)

    def samples_of(self, micro_batch: MicroBatch, epoch: int) -> list[Appearance]:
        """The samples of a micro-batch."""
        begins, group = self._open(epoch).begins[micro_batch.group], self._groups[micro_batch.group]
        numbers = np.searchsorted(begins, micro_batch.samples, side="right") - 1
        return [
            (group[number], position - int(begins[number]))
            for number, position in zip(numbers.tolist(), micro_batch.samples, strict=True)
        ]

    def positions(self, epoch: int, index: int) -> list[Positions]:
        """The positions of the samples of each micro-batch of one step."""
        opened, step = self._open(epoch), self.step(epoch, index)
        ends = list(accumulate(len(micro_batch.samples) for micro_batch in step))
        found = []
        for micro_batch, end in zip(step, ends, strict=True):
            in_step = range(end - len(micro_batch.samples), end)
            in_epoch = [opened.firsts[micro_batch.group] + position for position in micro_batch.samples]
            found.append(Positions(index, in_step, ends[-1], in_epoch, opened.size))
        return found

    def examples(self, epoch: int, index: int) -> int:
        """The number of samples in one step, over all data ranks."""
        return sum(len(micro_batch.samples) for micro_batch in self.step(epoch, index))

    def shapes(self, epoch: int, index: int) -> list[tuple[Shape, int]]:
        """The shape of the samples of each micro-batch of one step, and their number."""
        return [(self._groups[one.group][0].shape, len(one.samples)) for one in self.step(epoch, index)]

    def layout(self, epoch: int) -> dict[str, Any]:
        """What the order of an epoch follows from, beside the seed: as JSON."""
        shapes = {
            name: [group.size, group.micro_batch]
            for name, group in zip(self._names, self._sized(epoch), strict=True)
            if group.size
        }
        return {"micro_batches_per_step": self._per_step, "shapes": shapes}

    def state(self, epoch: int, index: int) -> dict[str, Any]:
        """What `go_on.py` needs to go on at a step with the samples that the epoch has not had: as JSON.

        Args:
            index: of the next step; it may be the number of the epoch's steps.
        """
        taken = self._open(epoch).order.taken(index - self._done_before(epoch))
        return {
            **self.layout(epoch),
            "taken": {name: count for name, count in zip(self._names, taken, strict=True) if count},
            "continued": self._continued and self._continued.as_dict(),
        }

    def table(self, epoch: int = 0) -> list[BucketLine]:
        """A line for each shape, then one of the total."""
        lines = []
        for group, every in zip(self._sized(epoch), self._groups, strict=True):
            name = " + ".join(f"{bucket.width}x{bucket.height}" for bucket in every[0].shape)
            lines.append(line_of(name, every, group.size, group.micro_batches, group.fill))
        everything = [sample for group in self._groups for sample in group]
        last = self.step(epoch, self.steps_in(epoch) - 1)
        again = [micro_batch for micro_batch in last if micro_batch.fill == len(micro_batch.samples)]
        fill = sum(line.fill for line in lines) + sum(micro_batch.fill for micro_batch in again)
        batches = sum(line.batches for line in lines) + len(again)
        return [*lines, line_of("", everything, sum(line.samples for line in lines), batches, fill)]

    def _open(self, epoch: int) -> _Epoch:
        """An epoch. The two newest are kept, since batches of the next epoch are read ahead."""
        with self._lock:
            if epoch not in self._opened:
                # Raises if the epoch is empty.
                self.steps_in(epoch)
                groups = self._sized(epoch)
                ends = list(accumulate(group.size for group in groups))
                firsts = [end - group.size for end, group in zip(ends, groups, strict=True)]
                order = EpochOrder(groups, self._per_step, self._seed, epoch)
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
        taken = self._continued.taken if self._is_begun(epoch) else {}
        return [
            Group(size, micro_batch, work, min(size, taken.get(name, 0)))
            for size, micro_batch, work, name in zip(sizes, self._micro_batches, self._work, self._names, strict=True)
        ]

    def _is_begun(self, epoch: int) -> bool:
        return self._continued is not None and self._continued.epoch == epoch

    def _done_before(self, epoch: int) -> int:
        """How many steps of an epoch were done before it went on otherwise."""
        return self._continued.steps if self._is_begun(epoch) else 0

    def _counted_steps(self, epoch: int) -> int:
        is_like_others = self._is_uniform and not self._is_begun(epoch)
        if is_like_others and self._steps_of_others:
            return self._steps_of_others
        steps = self._done_before(epoch) + steps_per_epoch(self._sized(epoch), self._per_step)
        if is_like_others:
            self._steps_of_others = steps
        if not steps:
            raise UserError.of(
                f"epoch {epoch + 1} has no sample at all; let some directory be used in every epoch",
                where="start_epoch, end_epoch, start_step, end_step, num_repeats",
            )
        return steps
