"""Batches hold the features of the samples they name, in the order they should, whoever reads them."""

import threading
import time
from collections import Counter
from dataclasses import replace

import pytest
import torch
from PIL import Image

from tests.utils.dataset.conftest import (
    CLIP_FACTS,
    LengthEncoder,
    MeanEncoder,
    PixelEncoder,
    WeightEncoder,
    WordsEncoder,
    dataset_of,
    draw_pictures,
    filled,
    plain_sample,
    samples_of,
)
from tests.utils.media.clips import write_video
from utils.dataset.batches import SMALLEST_AREA, EvaluationBatches, SampleReader, TrainingBatches
from utils.dataset.encoders import item_key
from utils.dataset.epochs import Epochs
from utils.dataset.masks import MaskEncoder
from utils.dataset.ordering import EpochOrder, Group
from utils.dataset.samples import SampleVersion, VersionPicker, evaluation_version
from utils.dataset.tensor_store import TensorStore
from utils.diffusion.losses import Labels, Loss
from utils.errors import UserError
from utils.media.decode import load_image
from utils.media.geometry import View
from utils.settings.dataset_schema import DatasetSettings, DirectorySettings

PICKER = VersionPicker(7, ["text"])


def micro_batch(bucket):
    """Two of the squares, three of the wide ones."""
    return 2 if bucket.width == bucket.height else 3


@pytest.fixture(scope="module")
def cached(tmp_path_factory):
    """The samples of a dataset of two buckets, 7 and 4 of them, and a reader of their cache."""
    folder = tmp_path_factory.mktemp("data")
    draw_pictures(folder / "square", 7, size=(32, 32))
    draw_pictures(folder / "wide", 4, size=(64, 32), seed=1)
    keys = {"resolutions": [64], "enable_ar_bucket": True, "ar_buckets": [1.0, 2.0]}
    samples = samples_of(dataset_of(folder / "square", folder / "wide", **keys), folder / "cache")
    encoders = [MeanEncoder(), LengthEncoder()]
    for encoder in encoders:
        filled(encoder, samples, folder / "cache")
    with SampleReader(encoders, folder / "cache") as reader:
        yield samples, reader


def keep(batch, epoch):
    return batch, epoch


def training(cached, data_rank=0, prepare=keep, ranks=2, accumulation=3):
    samples, reader = cached
    epochs = Epochs(samples, micro_batch, ranks, accumulation, seed=7)
    return TrainingBatches(epochs, reader, PICKER, prepare, data_rank)


def test_features_are_those_of_the_samples(cached):
    by_id = {sample.id: sample for sample in cached[0]}
    batches = training(cached)
    seen = set()
    for index in range(batches.epochs.steps_in(0)):
        for number, (batch, epoch) in enumerate(batches.step(0, index)):
            assert batch.features.keys() == {"mean_BC", "size_B", "length_B"} and epoch == 0
            own = batches.epochs.share(0, index, 0)[number]
            assert batch.positions == batches.epochs.positions(0, index)[own]
            for position, name in enumerate(batch.draws):
                sample = by_id[name]
                assert sample.bucket == batch.bucket
                pixels = load_image(sample.media.locator.path, View(sample.bucket.width, sample.bucket.height))
                torch.testing.assert_close(batch.features["mean_BC"][position], pixels.mean(dim=(1, 2, 3)))
                assert batch.features["length_B"][position] == len(sample.captions[0])
                seen.add(name)
    assert seen


def test_all_ranks_together_follow_the_order(cached):
    samples, _ = cached
    ranks = [training(cached, rank) for rank in range(2)]
    groups = [[s for s in samples if s.bucket.width == width] for width in (64, 96)]
    groups_of_order = [Group(7, 2, work=64 * 64), Group(4, 3, work=96 * 32)]
    expected = list(EpochOrder(groups_of_order, 6, seed=7, epoch=4))
    assert ranks[0].epochs.steps_in(4) == len(expected) == 1
    steps = [rank.step(4, 0) for rank in ranks]
    shown = sorted(batch.draws for step in steps for batch, _ in step)
    assert shown == sorted([groups[one.group][index].id for index in one.samples] for one in expected[0])
    assert [len(step) for step in steps] == [3, 3] and {epoch for step in steps for _, epoch in step} == {4}
    assert {name for step in steps for batch, _ in step for name in batch.draws} == {s.id for s in samples}


def draws(step):
    return [batch.draws for batch, _ in step]


def test_the_iterator_goes_on_from_anywhere_through_all_epochs(cached):
    batches = training(cached, ranks=1, accumulation=1)
    steps = batches.epochs.steps_in(0)
    positions = [(epoch, step) for epoch in range(3) for step in range(steps)]
    assert len(positions) == 18
    whole = batches.iterate(0, 0)
    run = [next(whole) for _ in positions]
    assert [step[0][1] for step in run] == [epoch for epoch, _ in positions]
    for start in (1, 6, 11):
        resumed = batches.iterate(*positions[start])
        assert [draws(next(resumed)) for _ in range(5)] == [draws(step) for step in run[start : start + 5]]
        resumed.close()
    whole.close()


def test_it_reads_ahead_but_not_far(cached):
    prepared = []
    batches = training(cached, prepare=lambda *arguments: prepared.append(arguments))
    iterator = batches.iterate(0, 0)
    next(iterator)
    deadline = time.monotonic() + 10
    while len(prepared) < 9 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    # One step was taken and two are ready, of three micro-batches each.
    assert len(prepared) == 9
    iterator.close()


def test_an_error_in_the_background_arrives_at_its_step(cached):
    def prepare(batch, epoch):
        if epoch == 2:
            raise ValueError("nothing to prepare")
        return epoch

    iterator = training(cached, prepare=prepare).iterate(0, 0)
    assert [next(iterator)[0] for _ in range(2)] == [0, 1]
    with pytest.raises(ValueError, match="nothing to prepare"):
        next(iterator)


def test_an_epoch_without_samples_is_told_when_it_comes(cached):
    rules = DirectorySettings(path=".", end_epoch=3)
    samples = [replace(sample, rules=rules) for sample in cached[0]]
    iterator = training((samples, cached[1])).iterate(0, 0)
    assert [step[0][1] for step in (next(iterator) for _ in range(3))] == [0, 1, 2]
    with pytest.raises(UserError, match="epoch 4 has no sample"):
        next(iterator)


def test_closing_ends_the_threads(cached):
    # Of other tests some may end meanwhile.
    before = set(threading.enumerate())
    iterator = training(cached).iterate(0, 0)
    next(iterator)
    assert set(threading.enumerate()) - before
    iterator.close()
    assert not set(threading.enumerate()) - before


@pytest.mark.parametrize("data_ranks", [1, 2, 3])
def test_evaluation_takes_each_sample_once(cached, data_ranks):
    samples, reader = cached
    ranks = [EvaluationBatches(samples, reader, micro_batch, data_ranks, rank) for rank in range(data_ranks)]
    taken = [list(rank) for rank in ranks]
    names = Counter(name for batches in taken for batch in batches for name in batch.draws)
    assert names == Counter(sample.id for sample in samples)
    assert [len(rank) for rank in ranks] == [len(batches) for batches in taken]
    assert max(map(len, taken)) - min(map(len, taken)) <= 1 and ranks[0].rounds == max(map(len, taken))
    again = [[batch.draws for batch in rank] for rank in ranks]
    assert again == [[batch.draws for batch in batches] for batches in taken]
    assert sorted(len(names) for batches in again for names in batches) == [1, 1, 2, 2, 2, 3]


def test_each_sample_of_a_step_counts_alike(cached):
    """Whatever the sizes of the micro-batches: the mean of their means is the mean over all samples."""
    factors = {sample.id: 0.5 + number for number, sample in enumerate(cached[0])}
    samples = [replace(sample, rules=plain_sample(loss_weight=factors[sample.id]).rules) for sample in cached[0]]
    for epoch in range(3):
        ranks = [training((samples, cached[1]), rank, accumulation=5) for rank in range(2)]
        batches = [batch for rank in ranks for batch, _ in rank.step(epoch, 0)]
        assert {len(batch.draws) for batch in batches} == {2, 3}
        errors = {name: float(len(name) + number) for number, name in enumerate(sorted(factors))}
        means = [
            Loss("mse")(
                torch.tensor([errors[name] for name in batch.draws]).sqrt()[:, None, None, None].expand(-1, 4, 2, 2),
                Labels(torch.zeros(len(batch.draws), 4, 2, 2), batch.weight),
            ).mean()
            for batch in batches
        ]
        version = [name for batch in batches for name in batch.draws]
        expected = sum(factors[name] * errors[name] for name in version) / len(version)
        assert sum(means).item() / len(means) == pytest.approx(expected, rel=1e-5)


def test_a_missing_and_a_damaged_item_are_told(pictures, cache):
    samples = samples_of(dataset_of(pictures), cache)
    vae = MeanEncoder()
    filled(vae, samples[:5], cache)
    with SampleReader([vae], cache) as reader:
        with pytest.raises(UserError, match="gone from the cache.*--resume_from_checkpoint"):
            reader.read(evaluation_version(samples[5]))
    (shard,) = cache.rglob("*.shard")
    shard.write_bytes(bytes(byte ^ 255 for byte in shard.read_bytes()))
    with SampleReader([vae], cache) as reader, pytest.raises(UserError, match="damaged.*--resume_from_checkpoint"):
        reader.read(evaluation_version(samples[0]))
    with TensorStore(cache / "vae") as store:
        assert store.missing([item_key(vae, evaluation_version(samples[0]))])


def write_captions(pictures, *captions):
    for index, caption in enumerate(captions):
        (pictures / f"{index:03d}.txt").write_text(caption)


def test_ragged_features_keep_their_length_and_are_padded_in_a_batch(pictures, cache):
    write_captions(pictures, "one", "one two three", "one two")
    samples = samples_of(dataset_of(pictures), cache)[:3]
    filled(WordsEncoder(), samples, cache)
    version = [evaluation_version(sample) for sample in samples]
    with SampleReader([WordsEncoder()], cache) as reader:
        assert [len(reader.read(one)["words_BLD"]) for one in version] == [1, 3, 2]
        features = reader.batch(version).features
    assert features["words_BLD"].shape == (3, 3, 3)
    assert features["mask_BL"].sum(1).tolist() == [1, 3, 2]
    assert torch.equal(features["words_BLD"].sum(2) > 0, features["mask_BL"])


def test_texts_made_as_they_are_needed_are_those_of_the_cache(pictures, cache):
    write_captions(pictures, "one", "(one:1.2) two three", "", "one two")
    samples = samples_of(dataset_of(pictures, uncond_fraction=0.5, weighted_tags=True), cache)
    encoders = [MeanEncoder(), WordsEncoder(), LengthEncoder(), WeightEncoder()]
    for encoder in encoders:
        filled(encoder, samples, cache)
    texts = encoders[1:]
    for without in (frozenset(), frozenset(["text", "words"])):
        version = [SampleVersion(sample, sample.takes[0], sample.captions[0], sample.id, without) for sample in samples]
        with SampleReader(encoders, cache) as reader, SampleReader(encoders, cache, texts) as live:
            expected, found = reader.batch(version).features, live.batch(version).features
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


class Careful(LengthEncoder):
    """Breaks when two threads use it at once, and gives what a gradient could go back through."""

    def __init__(self):
        super().__init__()
        self.weight, self.inside = torch.nn.Parameter(torch.ones(())), threading.Lock()

    def encode(self, *, caption):
        assert self.inside.acquire(blocking=False)
        time.sleep(0.02)
        lengths = self.weight * torch.tensor([float(len(text)) for text in caption])
        self.inside.release()
        return {"length_B": lengths}


def test_live_encoders_are_used_by_one_thread_at_a_time_and_without_gradients(cached, tmp_path):
    careful = Careful()
    with SampleReader([careful], tmp_path, [careful]) as live:
        iterator = training((cached[0], live), ranks=1, accumulation=1).iterate(0, 0)
        for _ in range(6):
            ((batch, _),) = next(iterator)
            assert not batch.features["length_B"].requires_grad
        iterator.close()


def eighth(width, height, frames):
    """The latents of a VAE that keeps all frames and an eighth of the size."""
    return (3, frames, height // 8, width // 8) if frames > 1 else (3, height // 8, width // 8)


@pytest.fixture
def masked(tmp_path, cache):
    """Shows three pictures, one whose left half counts, one of which a cell of 16 counts, and one without a mask, and
    their reader."""
    paths = draw_pictures(tmp_path / "pictures", 3, size=(32, 32))
    (tmp_path / "masks").mkdir()
    for path, white in zip(paths, ((16, 32), (8, 8)), strict=False):
        mask = Image.new("L", (32, 32))
        mask.paste(255, (0, 0, *white))
        mask.save(tmp_path / "masks" / path.name)

    def reading(**keys):
        directory = DirectorySettings(path=tmp_path / "pictures", mask_path=tmp_path / "masks", **keys)
        dataset = DatasetSettings(resolutions=[32], default_mask_file=paths[2], directory=[directory])
        samples = samples_of(dataset, cache)
        samples[2] = replace(samples[2], mask=None)
        encoders = [PixelEncoder(), MaskEncoder(eighth)]
        for encoder in encoders:
            filled(encoder, samples, cache)
        return [evaluation_version(sample) for sample in samples], SampleReader(encoders, cache)

    return reading


def test_the_weights_of_masked_and_unmasked_samples(masked):
    version, reader = masked(loss_weight=2.0, unmasked_weight=0.25)
    with reader:
        batch = reader.batch(version)
        assert batch.weight.shape == (3, 1, 4, 4) and batch.features.keys() == {"latents"}
        left, corner = torch.full((4, 4), 0.25), torch.full((4, 4), 0.25)
        left[:, :2] = 1
        corner[0, 0] = 1
        torch.testing.assert_close(batch.weight[:, 0], 2 * torch.stack([left, corner, torch.ones(4, 4)]))
        assert torch.equal(reader.batch(version[2:]).weight, torch.full((1, 1, 1, 1), 2.0))
        some = reader.batch(version, [False, True, True])
        torch.testing.assert_close(some.weight[:, 0], 2 * torch.stack([torch.ones(4, 4), corner, torch.ones(4, 4)]))
        assert torch.equal(reader.batch(version, [False] * 3).weight, torch.full((3, 1, 1, 1), 2.0))


def test_small_masks_may_count_as_much_as_large_ones(masked):
    version, reader = masked(normalize_masked_area=True)
    with reader:
        weight = reader.batch(version).weight
    torch.testing.assert_close(weight.mean((1, 2, 3)), torch.ones(3))
    assert weight[0].max() == pytest.approx(2) and weight[1].max() == pytest.approx(16)
    assert weight[0].min() == weight[1].min() == 0


def test_an_empty_mask_is_no_division_by_zero(tmp_path, cache):
    draw_pictures(tmp_path / "pictures", 1, size=(32, 32))
    Image.new("L", (32, 32)).save(tmp_path / "black.png")
    dataset = dataset_of(tmp_path / "pictures", default_mask_file=tmp_path / "black.png", normalize_masked_area=True)
    samples, encoder = samples_of(dataset, cache), MaskEncoder(eighth)
    filled(encoder, samples, cache)
    with SampleReader([encoder], cache) as reader:
        assert torch.equal(reader.batch([evaluation_version(samples[0])]).weight, torch.zeros(1, 1, 4, 4))
    assert SMALLEST_AREA > 0


def test_masks_are_applied_as_often_as_asked(masked):
    version, reader = masked(mask_probability=0.5)
    samples = [one.sample for one in version[:2]]
    epochs = Epochs(samples, lambda bucket: 2, 1, 1, seed=0)
    with reader:
        batches = TrainingBatches(epochs, reader, VersionPicker(0, []), keep, 0)
        applied = Counter()
        for epoch in range(60):
            ((batch, _),) = batches.step(epoch, 0)
            for name, weight in zip(batch.draws, batch.weight, strict=True):
                applied[name] += int(weight.min() == 0)
    assert all(15 < count < 45 for count in applied.values()) and len(applied) == 2


def test_weights_have_the_dimensions_of_latents(tmp_path, cache):
    """Of clips one more than of stills, masked or not."""
    write_video(tmp_path / "clip.mp4", frames=24, fps=16)
    (tmp_path / "clip.txt").write_text("a clip")
    Image.new("L", (64, 48), 255).save(tmp_path.parent / "white.png")
    found = {}
    for masked in (False, True):
        keys = {"default_mask_file": tmp_path.parent / "white.png"} if masked else {}
        dataset = dataset_of(tmp_path, frame_buckets=[5], video_clip_mode="multiple_overlapping", **keys)
        version = [evaluation_version(sample) for sample in samples_of(dataset, cache, CLIP_FACTS)[:2]]
        encoders = [PixelEncoder(), MaskEncoder(eighth)]
        for encoder in encoders:
            filled(encoder, [one.sample for one in version], cache)
        with SampleReader(encoders, cache) as reader:
            batch = reader.batch(version)
        assert batch.weight.dim() == batch.features["latents"].dim() == 5
        found[masked] = tuple(batch.weight.shape)
    assert found == {False: (2, 1, 1, 1, 1), True: (2, 1, 5, 4, 4)}
