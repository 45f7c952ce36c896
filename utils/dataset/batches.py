"""From the cache to batches, read in the background."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Generic, Self, TypeVar

import torch
from torch.nn.utils.rnn import pad_sequence

from utils.dataset.buckets import Bucket, Sample, by_bucket
from utils.dataset.encoding import Encoder, item_key
from utils.dataset.ordering import Slot, Step, epoch_order, steps_per_epoch
from utils.dataset.tensor_store import TensorStore
from utils.settings.errors import SettingsError

STEPS_AHEAD = 2

Item = TypeVar("Item")
Prepared = TypeVar("Prepared")


@dataclass(frozen=True)
class FeatureBatch:
    """What the encoders made of some samples of one bucket: features by name, batched in dimension 0."""

    features: dict[str, torch.Tensor]
    sample_ids: list[str]
    bucket: Bucket


class SampleReader:
    """Reads samples from the stores that `encoding.fill` filled."""

    def __init__(self, encoders: Sequence[Encoder], cache_dir: Path) -> None:
        self._stores = [(encoder, TensorStore(cache_dir / encoder.name)) for encoder in encoders]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def read(self, sample: Sample) -> dict[str, torch.Tensor]:
        """All features of one sample, on the CPU, without a batch dimension.

        Raises:
            SettingsError: the cache lacks the sample, or is damaged.
        """
        features: dict[str, torch.Tensor] = {}
        for encoder, store in self._stores:
            key = item_key(encoder, sample)
            try:
                item = store.get(key)
            except KeyError:
                raise SettingsError.of(
                    f"the item {key} is gone from the cache; was the folder cleared during the run? Go on with "
                    "--resume_from_checkpoint: what is missing is encoded first",
                    str(store.folder),
                ) from None
            shared = features.keys() & item.keys()
            assert not shared, f"{encoder.name} and another encoder both yield {shared}"
            features |= item
        return features

    def batch(self, samples: Sequence[Sample]) -> FeatureBatch:
        """Samples of one bucket as a batch."""
        items = [self.read(sample) for sample in samples]
        stacked = {name: _stacked([item[name] for item in items]) for name in items[0]}
        return FeatureBatch(stacked, [sample.id for sample in samples], samples[0].bucket)

    def close(self) -> None:
        for _, store in self._stores:
            store.close()


def _stacked(tensors: list[torch.Tensor]) -> torch.Tensor:
    """The tensors as a batch. Those of different lengths (dimension 0) are padded with zeros to the longest: an encoder
    whose features are ragged yields a mask of ones beside them, which is padded to say where they end."""
    if len({tensor.shape for tensor in tensors}) == 1:
        return torch.stack(tensors)
    return pad_sequence(tensors, batch_first=True)


class TrainingBatches(Generic[Prepared]):
    """A data rank's micro-batches of every step, in the order of `ordering.epoch_order`.

    Args:
        prepare: makes of (batch, epoch, step within the epoch, micro-batch within the step) what training
            takes; `iterate` calls it in a thread of its own.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        reader: SampleReader,
        prepare: Callable[[FeatureBatch, int, int, int], Prepared],
        *,
        micro_batch: int,
        data_ranks: int,
        data_rank: int,
        accumulation: int,
        seed: int,
    ) -> None:
        self._groups = list(by_bucket(samples).values())
        self._reader, self._prepare = reader, prepare
        self._micro_batch, self._data_rank = micro_batch, data_rank
        self._layout = ([len(group) for group in self._groups], micro_batch, data_ranks, accumulation)
        self._seed = seed
        self._order: tuple[int, list[Step]] = (-1, [])

    @property
    def steps_per_epoch(self) -> int:
        return steps_per_epoch(*self._layout)

    def step(self, epoch: int, index: int) -> list[Prepared]:
        """The prepared micro-batches of one step of an epoch, both counted from 0."""
        slots = self._steps(epoch)[index]
        return [self._prepare(self._batch(slot), epoch, index, number) for number, slot in enumerate(slots)]

    def iterate(self, epoch: int, index: int) -> Iterator[list[Prepared]]:
        """This step and those after it, epoch after epoch without end, read a few steps ahead in the
        background.

        Close the iterator to end the background thread. What goes wrong in it is raised here, at the step it
        is of.
        """
        return _ahead(partial(self.step, *position) for position in self._positions(epoch, index))

    def _positions(self, epoch: int, index: int) -> Iterator[tuple[int, int]]:
        for number in count(epoch):
            yield from ((number, step) for step in range(index if number == epoch else 0, self.steps_per_epoch))

    def _steps(self, epoch: int) -> list[Step]:
        if self._order[0] != epoch:
            self._order = epoch, epoch_order(*self._layout, self._seed, epoch)
        return self._order[1]

    def _batch(self, slot: Slot) -> FeatureBatch:
        group = self._groups[slot.bucket]
        return self._reader.batch([group[index] for index in slot.of_rank(self._data_rank, self._micro_batch)])


class EvaluationBatches:
    """A data rank's share of all samples, each of them once over all ranks, always in the same order. The
    last batch of a bucket may be smaller, and ranks may differ by one batch: `rounds` is the most that one has."""

    def __init__(
        self,
        samples: Sequence[Sample],
        reader: SampleReader,
        micro_batch: int,
        data_ranks: int,
        data_rank: int,
    ) -> None:
        batches = [
            group[start : start + micro_batch]
            for group in by_bucket(samples).values()
            for start in range(0, len(group), micro_batch)
        ]
        self.rounds = math.ceil(len(batches) / data_ranks)
        self._batches = batches[data_rank::data_ranks]
        self._reader = reader

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[FeatureBatch]:
        return _ahead(partial(self._reader.batch, batch) for batch in self._batches)


def _ahead(tasks: Iterable[Callable[[], Item]]) -> Iterator[Item]:
    """The tasks' results in order, worked on by one thread that is a few tasks ahead."""
    pending: deque[Future[Item]] = deque()
    pool = ThreadPoolExecutor(1)
    try:
        for task in tasks:
            pending.append(pool.submit(task))
            if len(pending) > STEPS_AHEAD:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
