"""The cache holds what encoders make, makes it once, and anew when what it is made from changes."""

import logging
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from PIL import Image

from tests.processes import run_ranks
from tests.utils.dataset.conftest import (
    CLIP_FACTS,
    LengthEncoder,
    MeanEncoder,
    counts,
    dataset_of,
    filled,
    item,
    samples_of,
    scanned,
    truncate,
)
from utils.dataset import encoding
from utils.dataset.buckets import assign
from utils.dataset.cache_lock import CacheLock
from utils.dataset.encoders import decoded_bytes, item_key
from utils.dataset.encoding import CacheJob, CacheReport, fill
from utils.dataset.samples import SampleVersion, evaluation_version
from utils.dataset.tensor_store import TensorStore
from utils.errors import UserError
from utils.media.decode import load_image
from utils.media.geometry import View
from utils.ranks import LaunchError, Ranks, sign_of_life


def test_what_encoders_make_is_kept(pictures, cache):
    samples = samples_of(dataset_of(pictures), cache)
    vae, text = MeanEncoder(), LengthEncoder()
    assert [counts(filled(encoder, samples, cache)) for encoder in (vae, text)] == [(6, 0, 6, 0)] * 2
    for sample in samples:
        pixels_CFHW = load_image(sample.media.locator.path, View(32, 32))
        found = item(cache, vae, evaluation_version(sample))
        torch.testing.assert_close(found["mean_BC"], pixels_CFHW.mean(dim=(1, 2, 3)))
        assert found["size_B"] == 32
        assert item(cache, text, evaluation_version(sample)) == {"length_B": len(sample.captions[0])}
    assert (vae.loads, vae.unloads) == (1, 1) and vae.batches == [(4, 3, 1, 32, 32), (2, 3, 1, 32, 32)]


def test_only_what_is_new_is_encoded(pictures, cache):
    dataset = dataset_of(pictures)

    def fill_both(fingerprint="mean-1"):
        samples = samples_of(dataset, cache)
        return [counts(filled(encoder, samples, cache)) for encoder in (MeanEncoder(fingerprint), LengthEncoder())]

    assert fill_both() == [(6, 0, 6, 0), (6, 0, 6, 0)]
    assert fill_both() == [(6, 6, 0, 0), (6, 6, 0, 0)]
    Image.new("RGB", (99, 99), (1, 2, 3)).save(pictures / "new.png")
    (pictures / "new.txt").write_text("picture 000")
    assert fill_both() == [(7, 6, 1, 0), (6, 6, 0, 0)]
    (pictures / "003.txt").write_text("another caption")
    assert fill_both() == [(7, 7, 0, 0), (6, 5, 1, 0)]
    Image.new("RGB", (48, 32), (3, 2, 1)).save(pictures / "004.png")
    assert fill_both() == [(7, 6, 1, 0), (6, 6, 0, 0)]
    (pictures / "005.png").rename(pictures / "moved.png")
    (pictures / "005.txt").rename(pictures / "moved.txt")
    assert fill_both() == [(7, 7, 0, 0), (6, 6, 0, 0)]
    assert fill_both("mean-2") == [(7, 0, 7, 0), (6, 6, 0, 0)]
    dataset = dataset_of(pictures, resolutions=[64])
    assert fill_both() == [(7, 0, 7, 0), (6, 6, 0, 0)]


def test_nothing_is_loaded_for_nothing(pictures, cache):
    samples = samples_of(dataset_of(pictures), cache)
    filled(MeanEncoder(), samples, cache)
    again = MeanEncoder()
    assert counts(filled(again, samples, cache)) == (6, 6, 0, 0) and again.loads == 0


def test_identical_pictures_and_captions_are_kept_once(pictures, cache):
    for path in pictures.glob("*.txt"):
        path.write_text("all the same")
    (pictures / "copy.png").write_bytes((pictures / "000.png").read_bytes())
    (pictures / "copy.txt").write_text("all the same")
    samples = samples_of(dataset_of(pictures, num_repeats=3, resolutions=[32, 64]), cache)
    assert len(samples) == 14
    vae, text = MeanEncoder(), LengthEncoder()
    assert counts(filled(vae, samples, cache)) == (12, 0, 12, 0)
    assert counts(filled(text, samples, cache)) == (1, 0, 1, 0)
    assert sorted(vae.batches) == sorted([(count, 3, 1, side, side) for side in (32, 64) for count in (4, 2)])


def test_all_versions_are_cached(pictures, cache):
    keys = {"augment_variants": 4, "crop": "random", "cache_shuffle_num": 50, "uncond_fraction": 0.1}
    for path in pictures.glob("*.txt"):
        path.write_text("a, b")
    samples = samples_of(dataset_of(pictures, **keys), cache)
    assert all(len(sample.takes) == 4 and set(sample.captions) == {"a, b", "b, a"} for sample in samples)
    vae, text = MeanEncoder(), LengthEncoder()
    # Two orders of the tags, and no caption at all.
    assert counts(filled(vae, samples, cache)) == (24, 0, 24, 0) and counts(filled(text, samples, cache)) == (
        3,
        0,
        3,
        0,
    )
    for sample in samples:
        for take in sample.takes:
            version = SampleVersion(sample, take, "b, a", "draw", frozenset(["text"]))
            pixels = load_image(sample.media.locator.path, View(32, 32, take.crop))
            torch.testing.assert_close(item(cache, vae, version)["mean_BC"], pixels.mean(dim=(1, 2, 3)))
            assert item(cache, text, version) == {"length_B": 0}


@pytest.mark.parametrize(
    "keys",
    [{"uncond_fraction": 0.1}, {"uncond_every_n_epochs": 3}, {"uncond_fraction_per_encoder": {"text": 0.5}}],
)
def test_the_caption_that_is_left_out_is_cached_once_if_it_ever_is(pictures, cache, keys):
    assert counts(filled(LengthEncoder(), samples_of(dataset_of(pictures), cache), cache)) == (6, 0, 6, 0)
    assert counts(filled(LengthEncoder(), samples_of(dataset_of(pictures, **keys), cache), cache)) == (7, 6, 1, 0)
    assert counts(filled(MeanEncoder(), samples_of(dataset_of(pictures, **keys), cache), cache)) == (6, 0, 6, 0)


@pytest.mark.parametrize("harm", ["gone", "cut"])
def test_what_a_shard_has_no_more_is_encoded_again_without_being_asked(pictures, cache, caplog, harm):
    samples = samples_of(dataset_of(pictures), cache)
    filled(MeanEncoder(), samples, cache)
    (shard,) = cache.rglob("*.shard")
    content = shard.read_bytes()
    shard.unlink()
    if harm == "cut":
        shard.write_bytes(content[: len(content) // 2 + 1])
    kept = 0 if harm == "gone" else 3
    assert counts(filled(MeanEncoder(), samples, cache)) == (6, kept, 6 - kept, 0)
    told = f"{cache / 'vae'}: damaged: {6 - kept} items, which are encoded again; in {shard.name}"
    assert told in caplog.messages
    assert counts(filled(MeanEncoder(), samples, cache, verify=True)) == (6, 6, 0, 0)


def test_damaged_items_are_encoded_again(pictures, cache):
    samples = samples_of(dataset_of(pictures), cache)
    filled(MeanEncoder(), samples, cache)
    with TensorStore(cache / "vae") as store:
        expected = [store.get(item_key(MeanEncoder(), evaluation_version(sample))) for sample in samples]
    (shard,) = cache.rglob("*.shard")
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    assert counts(filled(MeanEncoder(), samples, cache)) == (6, 6, 0, 0)
    assert counts(filled(MeanEncoder(), samples, cache, verify=True)) == (6, 5, 1, 0)
    with TensorStore(cache / "vae") as store:
        for sample, one in zip(samples, expected, strict=True):
            found = store.get(item_key(MeanEncoder(), evaluation_version(sample)))
            assert all(torch.equal(found[name], one[name]) for name in one)


def test_a_broken_file_stops_nothing(pictures, cache):
    whole = (pictures / "002.png").read_bytes()
    truncate(pictures / "002.png")
    samples = samples_of(dataset_of(pictures), cache)
    vae, text = MeanEncoder(), LengthEncoder()
    report = filled(vae, samples, cache, batch_size=3)
    assert counts(report) == (6, 0, 5, 1) and counts(filled(text, samples, cache)) == (6, 0, 6, 0)
    (failure,) = report.failures
    assert "002.png: cannot be read" in failure.reason and failure.digest == samples[2].media.digest
    (pictures / "002.png").write_bytes(whole)
    assert counts(filled(vae, samples_of(dataset_of(pictures), cache), cache)) == (6, 5, 1, 0)


def test_a_file_that_is_gone_since_the_scan(pictures, cache):
    samples = samples_of(dataset_of(pictures), cache)
    (pictures / "001.png").unlink()
    report = filled(MeanEncoder(), samples, cache)
    assert counts(report) == (6, 0, 5, 1) and "001.png: there is no such file" in report.failures[0].reason


class Breaking(MeanEncoder):
    def encode(self, *, pixels):
        if len(self.batches) == 2:
            raise RuntimeError("out of memory")
        return super().encode(pixels=pixels)


def test_an_encoders_own_error_is_raised_and_what_was_done_is_kept(pictures, cache):
    samples, breaking = samples_of(dataset_of(pictures), cache), Breaking()
    with pytest.raises(RuntimeError, match="out of memory"):
        filled(breaking, samples, cache, batch_size=2)
    assert breaking.unloads == 1
    assert counts(filled(MeanEncoder(), samples, cache)) == (6, 4, 2, 0)


@pytest.mark.parametrize(
    ("encoder", "size", "ways"),
    [
        (
            MeanEncoder,
            2,
            "Set caching_batch_size = 1, smaller `resolutions` or shorter clips in the dataset's file, or",
        ),
        (
            LengthEncoder,
            1,
            'Set [model] text_encoder_dtype = "nf4" or "float8", or fill the cache on a larger GPU',
        ),
    ],
)
@pytest.mark.parametrize("method", ["load", "encode"])
def test_a_gpu_that_is_too_small_is_told_with_what_to_set(pictures, cache, encoder, size, ways, method, monkeypatch):
    def full(*_, **inputs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity")

    monkeypatch.setattr(encoder, method, full)
    monkeypatch.setattr(LengthEncoder, "smaller_formats", ("nf4", "float8"), raising=False)
    with pytest.raises(UserError) as caught:
        filled(encoder(), samples_of(dataset_of(pictures), cache), cache, batch_size=size)
    told = str(caught.value)
    assert f"caching, {encoder.name}: the GPU's memory does not suffice (CUDA out of memory. Tried to all" in told
    assert ways in told


class Stopped(Exception):
    pass


def test_a_stop_keeps_what_was_done(pictures, cache):
    samples, calls = samples_of(dataset_of(pictures), cache), []

    def raise_if_stopping():
        calls.append(1)
        if len(calls) == 2:
            raise Stopped

    with pytest.raises(Stopped):
        filled(MeanEncoder(), samples, cache, batch_size=2, raise_if_stopping=raise_if_stopping)
    assert counts(filled(MeanEncoder(), samples, cache)) == (6, 4, 2, 0)


def test_says_what_it_did(pictures, cache, caplog):
    caplog.set_level(logging.INFO)
    filled(MeanEncoder(), samples_of(dataset_of(pictures), cache), cache)
    assert any(line.startswith("cache vae: wanted=6 reused=0 encoded=6 failed=0") for line in caplog.messages)
    assert "9 captions truncated" in str(CacheReport("text", 1, 0, 1, 0, truncated=9))


class CountingPool(ThreadPoolExecutor):
    """Threads whose tasks are counted: a budget is kept when what was handed over and not yet given back fits it."""

    def __init__(self):
        super().__init__(2)
        self.submitted = []

    def submit(self, task, encoder, version):
        self.submitted.append(decoded_bytes(encoder, version))
        return super().submit(task, encoder, version)


@pytest.mark.parametrize("batches_of_budget", [0.1, 1.0, 2.5, 100.0])
def test_decoding_ahead_keeps_to_its_budget(pictures, cache, batches_of_budget):
    samples = samples_of(dataset_of(pictures, resolutions=[32, 48, 64, 80, 96]), cache)
    encoder = MeanEncoder()
    items = {item_key(encoder, evaluation_version(sample)): evaluation_version(sample) for sample in samples}
    batches = list(encoding._batches(items, encoder, 2))
    sizes = [sum(decoded_bytes(encoder, items[key]) for key in batch) for batch in batches]
    budget = int(max(sizes) * batches_of_budget)
    given, most = 0, 0
    with CountingPool() as pool:
        for number, batch in enumerate(encoding._decoded(batches, items, encoder, budget, pool)):
            held = sum(pool.submitted) - given
            assert list(batch) == batches[number]
            assert held <= max(budget, sizes[number])
            given += sizes[number]
            most = max(most, held)
        assert len(pool.submitted) == len(items) and given == sum(sizes)
    # Neither does it stay far below.
    assert most >= min(budget - max(sizes), sum(sizes[: encoding.BATCHES_AHEAD]))


def test_the_second_run_waits_and_is_told_once_who_fills_the_cache(cache, caplog, monkeypatch):
    monkeypatch.setattr(encoding, "SECONDS_BETWEEN_TRIES", 0.05)
    with CacheLock(cache) as other:
        other.acquire(0, str)
        told = f"another run fills this cache, and is waited for: {other.holder()}"
        started = time.monotonic()
        threading.Timer(0.5, other.release).start()
        with CacheJob(cache, cache, Ranks()).alone():
            assert time.monotonic() - started > 0.4 and caplog.messages == [told]
            with pytest.raises(Stopped), CacheJob(cache, cache, Ranks(), raise_if_stopping=stop).alone():
                pass
    with CacheJob(cache, cache, Ranks(), raise_if_stopping=stop).alone():
        pass


def stop():
    raise Stopped


def fill_as_rank(ranks, dataset, cache):
    """One of two processes that fill one cache twice, the second time all of it."""
    rows = scanned(dataset, cache / f"own{ranks.rank}").rows
    samples = assign(rows, dataset, CLIP_FACTS).samples
    found = []
    for name, again in (("vae", False), ("vae2", True)):
        vae = MeanEncoder()
        vae.name = name
        report = fill(vae, samples, CacheJob(cache, cache, ranks, 2, regenerate=again))
        found.append((counts(report), len(report.failures), sum(shape[0] for shape in vae.batches)))
    return found


def test_two_ranks_share_the_work(pictures, cache):
    truncate(pictures / "002.png")
    cache.mkdir()
    found = run_ranks(fill_as_rank, 2, dataset_of(pictures), cache)
    # The report is of both, and the same on both; three files each, of which one is broken.
    totals = [((6, 0, 5, 1), 1), ((6, 0, 5, 1), 1)]
    assert [[(total, failures) for total, failures, _ in one] for one in found] == [totals, totals]
    assert [sorted(encoded) for encoded in zip(*([own for *_, own in one] for one in found), strict=True)] == [
        [2, 3]
    ] * 2
    with TensorStore(cache / "vae") as store:
        assert len(store) == 5


def fill_what_is_filled(ranks, dataset, cache):
    """Only the main rank is told what is wanted."""
    samples = assign(scanned(dataset, cache).rows, dataset, CLIP_FACTS).samples if ranks.is_main else None
    return counts(fill(MeanEncoder(), samples, CacheJob(cache, cache, ranks, 2)))


def test_one_rank_looks_whether_the_cache_is_whole(pictures, cache):
    cache.mkdir()
    assert fill_what_is_filled(Ranks(), dataset_of(pictures), cache) == (6, 0, 6, 0)
    assert run_ranks(fill_what_is_filled, 2, dataset_of(pictures), cache) == [(6, 6, 0, 0)] * 2


class Hanging(MeanEncoder):
    def load(self, device):
        super().load(device)
        time.sleep(3)


class Slow(MeanEncoder):
    def encode(self, *, pixels):
        time.sleep(0.4)
        return super().encode(pixels=pixels)


def fill_with_one_slow_rank(ranks, dataset, cache, slow):
    samples = assign(scanned(dataset, cache / f"own{ranks.rank}").rows, dataset, CLIP_FACTS).samples
    encoder = slow() if ranks.rank == 1 else MeanEncoder()
    try:
        return counts(fill(encoder, samples, CacheJob(cache, cache, ranks, 1, patience=timedelta(seconds=1))))
    except TimeoutError as error:
        return str(error)


def test_a_rank_that_gives_no_sign_of_life_is_named(pictures, cache):
    cache.mkdir()
    told, _ = run_ranks(fill_with_one_slow_rank, 2, dataset_of(pictures), cache, Hanging)
    assert "'cache/vae' from the ranks [1]" in told


def test_a_rank_that_is_slow_is_waited_for(pictures, cache):
    cache.mkdir()
    assert run_ranks(fill_with_one_slow_rank, 2, dataset_of(pictures), cache, Slow) == [(6, 0, 6, 0)] * 2


def fill_until_the_main_rank_ends(ranks, cache):
    """The main rank, which keeps what the others talk through, ends with an error of its own."""
    if ranks.is_main:
        with pytest.raises(OSError), CacheJob(cache, cache, ranks).alone():
            raise OSError("no room")
        dist.destroy_process_group()
        return ""
    try:
        with CacheJob(cache, cache, ranks).alone():
            while True:
                sign_of_life(ranks, "test")
                time.sleep(0.05)
    except LaunchError as error:
        dist.destroy_process_group()
        return str(error)


def test_the_others_say_so_when_the_main_rank_is_gone(cache):
    cache.mkdir()
    assert "the main process of this run has ended" in run_ranks(fill_until_the_main_rank_ends, 2, cache)[1]
