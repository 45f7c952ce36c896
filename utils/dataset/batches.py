"""From the cache to batches, read in the background."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Generic, Self, TypeVar

import torch
from torch.nn.utils.rnn import pad_sequence

from utils.attention_switch import kept_off
from utils.dataset.buckets import by_shape
from utils.dataset.encoders import Encoder, applies_to, item_key, reads_text, text_of
from utils.dataset.epochs import Epochs, Positions
from utils.dataset.masks import MASK
from utils.dataset.ordering import MicroBatch
from utils.dataset.read_ahead import ReadAhead
from utils.dataset.samples import Bucket, Sample, SampleVersion, VersionPicker, evaluation_version
from utils.dataset.tensor_store import CorruptItem, TensorStore
from utils.errors import UserError
from utils.settings.dataset_schema import DirectorySettings

SMALLEST_LATENT = 4
"""The fewest dimensions that a batch of latents has."""
SMALLEST_AREA = 1e-3
"""When the weight of a mask is divided by its area, a smaller mask counts as if it covered this share of the
picture."""

Prepared = TypeVar("Prepared")


@dataclass(frozen=True)
class FeatureBatch:
    """The features of some samples of one shape by name, batched in dimension 0.

    Attributes:
        draws: names of what is drawn for each sample.
        weight: factor on the loss. It has as many dimensions as a batch of latents, which are the features with the
            most dimensions: (B, 1, h, w) or (B, 1, f, h, w) where there is a mask, otherwise (B, 1, ...).
        regularising: whether each sample is regularisation data (B,).
        captioned: whether each sample comes with its caption (B,).
        empty: the text encoders' features of the empty caption, if they are requested.
        positions: in training, where the samples stand in their step and epoch.
        share: what is in `weight` so that samples of micro-batches of other sizes count alike.
    """

    features: dict[str, torch.Tensor]
    draws: list[str]
    bucket: Bucket
    weight: torch.Tensor
    regularising: torch.Tensor | None = None
    captioned: torch.Tensor | None = None
    empty: dict[str, torch.Tensor] | None = None
    positions: Positions | None = None
    share: float = 1.0


class SampleReader:
    """Reads samples from the stores that `encoding.fill` filled.

    Args:
        live: loaded text encoders whose features are not cached but computed when they are needed.
    """

    def __init__(self, encoders: Sequence[Encoder], cache_dir: Path, live: Sequence[Encoder] = ()) -> None:
        self._stores = [(encoder, TensorStore(cache_dir / encoder.name)) for encoder in encoders if encoder not in live]
        self._live = list(live)
        # One thread at a time: the tokenizers of transformers break when two use them.
        self._live_lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def read(self, versions: SampleVersion, *, text_alone: bool = False) -> dict[str, torch.Tensor]:
        """All cached features of one sample, or only those of the text encoders, on the CPU, without a batch dimension.

        Raises:
            UserError: the cache lacks the sample, or is damaged.
        """
        features: dict[str, torch.Tensor] = {}
        for encoder, store in self._stores:
            if not applies_to(encoder, versions.sample) or (text_alone and not reads_text(encoder)):
                continue
            item = _item(store, item_key(encoder, versions))
            shared = features.keys() & item.keys()
            assert not shared, f"{encoder.name} and another encoder both yield {shared}"
            features |= item
        return features

    def batch(self, versions: Sequence[SampleVersion], masked: Sequence[bool] | None = None) -> FeatureBatch:
        """Samples of one shape as a batch; `masked` says for each whether its mask is applied (default: yes)."""
        items = [self.read(one) for one in versions]
        masks = [item.pop(MASK, None) for item in items]
        applied = [mask if use else None for mask, use in zip(masks, masked or [True] * len(items), strict=True)]
        features = {name: pad_ragged([item[name] for item in items]) for name in items[0]}
        features |= self._made(versions)
        dimensions = max([SMALLEST_LATENT, *(tensor.dim() for tensor in features.values())])
        weight = _weights([one.sample for one in versions], applied, dimensions)
        regularising = torch.tensor([one.sample.rules.is_regularisation_data for one in versions])
        return FeatureBatch(features, [one.draw for one in versions], versions[0].sample.bucket, weight, regularising)

    def without_captions(self, versions: Sequence[SampleVersion]) -> dict[str, torch.Tensor]:
        """The text encoders' features of the empty caption, batched, for samples of one shape."""
        empty = [replace(one, caption="") for one in versions]
        items = [self.read(one, text_alone=True) for one in empty]
        return {name: pad_ragged([item[name] for item in items]) for name in items[0]} | self._made(empty)

    def _made(self, versions: Sequence[SampleVersion]) -> dict[str, torch.Tensor]:
        """The live encoders' features of the captions."""
        features: dict[str, torch.Tensor] = {}
        for encoder in self._live:
            texts = {
                input_name: [text_of(one, encoder, input_name) for one in versions] for input_name in encoder.reads
            }
            with self._live_lock, kept_off(), torch.no_grad():
                made = encoder.encode(**texts)
            features |= {name: pad_ragged([tensor.cpu() for tensor in tensors]) for name, tensors in made.items()}
        return features

    def close(self) -> None:
        for _, store in self._stores:
            store.close()


def _item(store: TensorStore, key: str) -> dict[str, torch.Tensor]:
    try:
        return store.get(key)
    except KeyError:
        reason = "is gone from the cache; was the folder cleared during the run?"
    except CorruptItem as error:
        # The next start then knows that it is missing.
        store.delete([key])
        reason = (
            f"was damaged ({error.problems[0].file}) and is taken out of the cache. Others may be too: "
            'verify = "content" of the run reads all of them at its start.'
        )
    raise UserError.of(
        f"the item {key} {reason} Go on with --resume_from_checkpoint: what is missing is encoded first",
        str(store.folder),
    )


def _weights(samples: Sequence[Sample], masks: Sequence[torch.Tensor | None], dimensions: int) -> torch.Tensor:
    """The factor on each sample's loss; it varies over the latent where some sample has a mask."""
    shape = next((mask.shape for mask in masks if mask is not None), (1,) * (dimensions - 1))
    return torch.stack([_weight(sample.rules, mask).expand(shape) for sample, mask in zip(samples, masks, strict=True)])


def _weight(rules: DirectorySettings, mask: torch.Tensor | None) -> torch.Tensor:
    """`unmasked_weight` where the mask is 0 and 1 where it is 1, over its mean if masked areas are to count alike."""
    if mask is None:
        return torch.tensor(rules.loss_weight)
    weight = rules.unmasked_weight + (1 - rules.unmasked_weight) * mask.float()
    if rules.normalize_masked_area:
        weight = weight / weight.mean().clamp_min(SMALLEST_AREA)
    return rules.loss_weight * weight


def pad_ragged(tensors: list[torch.Tensor]) -> torch.Tensor:
    """The tensors as a batch. Tensors of different lengths (dimension 0) are padded with zeros to the longest. An
    encoder with ragged features yields a mask of ones beside them, and the padded mask says where they end."""
    if len({tensor.shape for tensor in tensors}) == 1:
        return torch.stack(tensors)
    return pad_sequence(tensors, batch_first=True)


class TrainingBatches(Generic[Prepared]):
    """A data rank's micro-batches of every step, in the order of `Epochs`.

    Args:
        picker: picks the version in which a sample is trained.
        prepare: (batch, epoch) -> what training takes. The weights of a batch make each sample of a step count alike in
            the mean over its micro-batches, those of all data ranks, whatever their sizes; samples that are repeated to
            fill a batch count like the others.
        with_empty: also give the features of the empty caption.
    """

    def __init__(
        self,
        epochs: Epochs,
        reader: SampleReader,
        picker: VersionPicker,
        prepare: Callable[[FeatureBatch, int], Prepared],
        data_rank: int,
        *,
        with_empty: bool = False,
    ) -> None:
        self.epochs = epochs
        self._reader, self._picker, self._prepare = reader, picker, prepare
        self._data_rank, self._with_empty = data_rank, with_empty

    def step(self, epoch: int, index: int) -> list[Prepared]:
        """The prepared micro-batches of one step of an epoch, both counted from 0."""
        step, positions = self.epochs.step(epoch, index), self.epochs.positions(epoch, index)
        mean = self.epochs.examples(epoch, index) / len(step)
        return [
            self._prepare(self._batch(step[number], positions[number], epoch, len(step[number].samples) / mean), epoch)
            for number in self.epochs.share(epoch, index, self._data_rank)
        ]

    def iterate(self, epoch: int, index: int) -> ReadAhead[list[Prepared]]:
        """This step and all later ones, epoch after epoch without end, read a few steps ahead in the background."""
        return ReadAhead(partial(self.step, *position) for position in self._positions(epoch, index))

    def _positions(self, epoch: int, index: int) -> Iterator[tuple[int, int]]:
        for number in count(epoch):
            first = index if number == epoch else 0
            yield from ((number, step) for step in range(first, self.epochs.steps_in(number)))

    def _batch(self, micro_batch: MicroBatch, positions: Positions, epoch: int, share: float) -> FeatureBatch:
        appearances = self.epochs.samples_of(micro_batch, epoch)
        versions = [self._picker.pick(sample, epoch, number) for sample, number in appearances]
        batch = self._reader.batch(versions, [self._picker.is_masked(one, epoch) for one in versions])
        captioned = torch.tensor([self._picker.is_captioned(one) for one in versions])
        empty = self._reader.without_captions(versions) if self._with_empty else None
        weight = share * batch.weight
        return replace(batch, weight=weight, positions=positions, captioned=captioned, empty=empty, share=share)


class EvaluationBatches:
    """A data rank's share of all samples, always in the same order; over all ranks each sample comes once. The last
    batch of a bucket may be smaller, and ranks may differ by one batch.

    Attributes:
        samples: all, of all ranks.
        rounds: the largest number of batches that a rank has.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        reader: SampleReader,
        micro_batch: Callable[[Bucket], int],
        data_ranks: int,
        data_rank: int,
    ) -> None:
        batches = [
            group[start : start + size]
            for group in by_shape(samples).values()
            for size in [micro_batch(group[0].bucket)]
            for start in range(0, len(group), size)
        ]
        self.samples = samples
        self.rounds = math.ceil(len(batches) / data_ranks)
        self._batches = batches[data_rank::data_ranks]
        self._reader = reader

    @property
    def own(self) -> list[Sample]:
        """This rank's samples, in their order."""
        return [sample for batch in self._batches for sample in batch]

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[FeatureBatch]:
        reading = ReadAhead(
            partial(self._reader.batch, [evaluation_version(one) for one in batch]) for batch in self._batches
        )
        try:
            yield from reading
        finally:
            reading.close()
