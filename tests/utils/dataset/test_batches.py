"""Batches hold the features of the samples they name, in the order they should, whoever reads them."""

import threading
import time
from collections import Counter

import pytest
import torch

from tests.utils.dataset.conftest import LengthEncoder, MeanEncoder, dataset_of, draw_pictures, samples_of
from utils.dataset.batches import EvaluationBatches, SampleReader, TrainingBatches
from utils.dataset.encoding import fill
from utils.dataset.ordering import epoch_order
from utils.media.decode import load_image
from utils.ranks import Ranks

LAYOUT = {"micro_batch": 2, "data_ranks": 2, "accumulation": 3, "seed": 7}


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    """The samples of a dataset of two buckets, 7 and 4 of them, and a reader of their cache."""
    folder = tmp_path_factory.mktemp("data")
    draw_pictures(folder / "square", 7, size=(32, 32))
    draw_pictures(folder / "wide", 4, size=(64, 32), seed=1)
    dataset = dataset_of(
        folder / "square", folder / "wide", resolutions=[64], enable_ar_bucket=True, ar_buckets=[1.0, 2.0]
    )
    samples = samples_of(dataset, folder / "index")
    encoders = [MeanEncoder(), LengthEncoder()]
    fill(encoders, samples, folder / "cache", Ranks(), 4, torch.device("cpu"))
    with SampleReader(encoders, folder / "cache") as reader:
        yield samples, reader


def keep(batch, epoch, step, micro_batch):
    return batch, epoch, step, micro_batch


def training(filled, data_rank=0, prepare=keep):
    samples, reader = filled
    return TrainingBatches(samples, reader, prepare, data_rank=data_rank, **LAYOUT)


def test_features_are_those_of_the_samples(filled):
    by_id = {sample.id: sample for sample in filled[0]}
    batches = training(filled)
    for index in range(batches.steps_per_epoch):
        for batch, *_ in batches.step(0, index):
            assert batch.features.keys() == {"mean_BC", "size_B", "length_B"}
            for position, name in enumerate(batch.sample_ids):
                sample = by_id[name]
                assert sample.bucket == batch.bucket
                pixels = load_image(sample.media.path, sample.bucket.width, sample.bucket.height)
                torch.testing.assert_close(batch.features["mean_BC"][position], pixels.mean(dim=(1, 2, 3)))
                assert batch.features["length_B"][position] == len(sample.caption)


def test_all_ranks_together_follow_the_order(filled):
    samples, _ = filled
    ranks = [training(filled, rank) for rank in range(2)]
    expected = epoch_order([7, 4], 2, 2, 3, seed=7, epoch=4)
    groups = [sorted((s for s in samples if s.bucket.width == width), key=samples.index) for width in (64, 96)]
    assert ranks[0].steps_per_epoch == len(expected) == 1
    steps = [rank.step(4, 0) for rank in ranks]
    for number, slot in enumerate(expected[0]):
        ids = [name for step in steps for name in step[number][0].sample_ids]
        assert ids == [groups[slot.bucket][index].id for index in slot.samples]
        assert all(step[number][1:] == (4, 0, number) for step in steps)
    assert {name for step in steps for batch, *_ in step for name in batch.sample_ids} == {s.id for s in samples}


def ids(step):
    return [batch.sample_ids for batch, *_ in step]


def test_the_iterator_goes_on_from_anywhere_through_all_epochs(filled):
    samples, reader = filled
    batches = TrainingBatches(samples, reader, keep, micro_batch=2, data_ranks=1, data_rank=0, accumulation=1, seed=3)
    assert batches.steps_per_epoch == 6
    positions = [(epoch, step) for epoch in range(3) for step in range(6)]
    whole = batches.iterate(0, 0)
    run = [next(whole) for _ in positions]
    assert [step[0][1:3] for step in run] == positions
    for start in (1, 6, 11):
        resumed = batches.iterate(*positions[start])
        assert [ids(next(resumed)) for _ in range(5)] == [ids(step) for step in run[start : start + 5]]
        resumed.close()
    whole.close()


def test_it_reads_ahead_but_not_far(filled):
    prepared = []
    batches = training(filled, prepare=lambda *arguments: prepared.append(arguments[1:]))
    iterator = batches.iterate(0, 0)
    next(iterator)
    deadline = time.monotonic() + 10
    while len(prepared) < 9 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    # One step was taken and two are ready, of three micro-batches each.
    assert len(prepared) == 9
    iterator.close()


def test_an_error_in_the_background_arrives_at_its_step(filled):
    def prepare(batch, epoch, step, micro_batch):
        if epoch == 2:
            raise ValueError("nothing to prepare")
        return epoch

    iterator = training(filled, prepare=prepare).iterate(0, 0)
    assert [next(iterator)[0] for _ in range(2)] == [0, 1]
    with pytest.raises(ValueError, match="nothing to prepare"):
        next(iterator)


def test_closing_ends_the_thread(filled):
    before = threading.active_count()
    iterator = training(filled).iterate(0, 0)
    next(iterator)
    assert threading.active_count() == before + 1
    iterator.close()
    assert threading.active_count() == before


@pytest.mark.parametrize("data_ranks", [1, 2, 3])
def test_evaluation_takes_each_sample_once(filled, data_ranks):
    samples, reader = filled
    ranks = [EvaluationBatches(samples, reader, 3, data_ranks, rank) for rank in range(data_ranks)]
    taken = [list(rank) for rank in ranks]
    names = Counter(name for batches in taken for batch in batches for name in batch.sample_ids)
    assert names == Counter(sample.id for sample in samples)
    assert [len(rank) for rank in ranks] == [len(batches) for batches in taken]
    assert max(map(len, taken)) - min(map(len, taken)) <= 1
    again = [[batch.sample_ids for batch in rank] for rank in ranks]
    assert again == [[batch.sample_ids for batch in batches] for batches in taken]
    assert sorted(len(name_list) for batches in again for name_list in batches) == [1, 1, 3, 3, 3]


class RaggedEncoder:
    """As many ones as the caption has words, and a mask of them."""

    name, reads, fingerprint = "ragged", ("caption",), "1"

    def load(self, device):
        pass

    def unload(self):
        pass

    def encode(self, caption):
        lengths = [len(text.split()) for text in caption]
        return {
            "words": [torch.ones(length, 3) for length in lengths],
            "mask": [torch.ones(length, dtype=torch.bool) for length in lengths],
        }


def test_ragged_features_keep_their_length_and_are_padded_in_a_batch(tmp_path):
    folder = tmp_path / "pictures"
    draw_pictures(folder, 3)
    for index, caption in enumerate(("one", "one two three", "one two")):
        (folder / f"{index:03d}.txt").write_text(caption)
    samples = samples_of(dataset_of(folder), tmp_path / "index.sqlite")
    fill([RaggedEncoder()], samples, tmp_path / "cache", Ranks(), 3, torch.device("cpu"))
    with SampleReader([RaggedEncoder()], tmp_path / "cache") as reader:
        assert [len(reader.read(sample)["words"]) for sample in samples] == [1, 3, 2]
        features = reader.batch(samples).features
    assert features["words"].shape == (3, 3, 3)
    assert features["mask"].sum(1).tolist() == [1, 3, 2]
    assert torch.equal(features["words"].sum(2) > 0, features["mask"])
