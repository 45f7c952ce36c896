"""The cache holds what encoders make, makes it once, and anew when what it is made from changes."""

import logging
import multiprocessing
import socket
from dataclasses import replace
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from PIL import Image

from tests.utils.dataset.conftest import (
    FACTS,
    DifferenceEncoder,
    LengthEncoder,
    MeanEncoder,
    dataset_of,
    draw_pictures,
    samples_of,
)
from utils.dataset.buckets import assign
from utils.dataset.encoding import CacheReport, fill, item_key
from utils.dataset.manifest import scan
from utils.dataset.tensor_store import TensorStore
from utils.media.decode import load_image
from utils.ranks import Ranks
from utils.settings.schema import DatasetSettings, DirectorySettings

CPU = torch.device("cpu")


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


def fill_alone(encoders, samples, cache, batch_size=4, **options):
    return fill(encoders, samples, cache, Ranks(), batch_size, CPU, **options)


def report(encoder, wanted, reused, encoded, failed=0):
    return CacheReport(encoder.name, wanted, reused, encoded, failed)


def test_what_encoders_make_is_kept(pictures, cache, tmp_path):
    samples = samples_of(dataset_of(pictures), tmp_path / "index")
    vae, text = MeanEncoder(), LengthEncoder()
    assert fill_alone([vae, text], samples, cache) == [report(vae, 6, 0, 6), report(text, 6, 0, 6)]
    with TensorStore(cache / "vae") as store, TensorStore(cache / "text") as texts:
        for sample in samples:
            pixels_CFHW = load_image(sample.media.path, 32, 32)
            item = store.get(item_key(vae, sample))
            torch.testing.assert_close(item["mean_BC"], pixels_CFHW.mean(dim=(1, 2, 3)))
            assert item["size_B"] == 32
            assert texts.get(item_key(text, sample)) == {"length_B": len(sample.caption)}
    assert (vae.loads, vae.unloads) == (1, 1) and vae.batches == [(4, 3, 1, 32, 32), (2, 3, 1, 32, 32)]


def test_only_what_is_new_is_encoded(pictures, cache, tmp_path):
    dataset = dataset_of(pictures)
    fill_alone([MeanEncoder(), LengthEncoder()], samples_of(dataset, tmp_path / "index"), cache)
    Image.new("RGB", (99, 99), (1, 2, 3)).save(pictures / "new.png")
    (pictures / "new.txt").write_text("picture 000")
    (pictures / "003.txt").write_text("another caption")
    (pictures / "005.png").rename(pictures / "moved.png")
    (pictures / "005.txt").rename(pictures / "moved.txt")
    vae, text = MeanEncoder(), LengthEncoder()
    samples = samples_of(dataset, tmp_path / "index")
    assert fill_alone([vae, text], samples, cache) == [report(vae, 7, 6, 1), report(text, 6, 5, 1)]
    again = MeanEncoder()
    assert fill_alone([again], samples, cache) == [report(again, 7, 7, 0)]
    assert again.loads == 0


def test_repeats_and_captions_share_items(pictures, cache, tmp_path):
    for path in pictures.glob("*.txt"):
        path.write_text("all the same")
    samples = samples_of(dataset_of(pictures, num_repeats=3, resolutions=[32, 64]), tmp_path / "index")
    assert len(samples) == 36
    vae, text = MeanEncoder(), LengthEncoder()
    assert fill_alone([vae, text], samples, cache) == [report(vae, 12, 0, 12), report(text, 1, 0, 1)]
    assert sorted(vae.batches) == sorted([(count, 3, 1, side, side) for side in (32, 64) for count in (4, 2)])


def test_a_key_names_all_that_an_item_is_made_from(pictures, tmp_path):
    sample = samples_of(dataset_of(pictures), tmp_path / "index")[0]
    vae, text = MeanEncoder(), LengthEncoder()
    other_picture = replace(sample, media=replace(sample.media, digest="0" * 32))
    other_bucket = replace(sample, bucket=replace(sample.bucket, width=48))
    other_caption = replace(sample, caption="another")
    moved = replace(sample, id="x", repeat=4, media=replace(sample.media, path="elsewhere"))
    variants = [sample, other_picture, other_bucket, other_caption, moved]
    pixel_keys = [item_key(vae, variant) for variant in variants]
    assert len(set(pixel_keys)) == 3 and pixel_keys[0] == pixel_keys[3] == pixel_keys[4]
    caption_keys = [item_key(text, variant) for variant in variants]
    assert len(set(caption_keys)) == 2 and caption_keys[0] != caption_keys[3]
    assert item_key(MeanEncoder("mean-2"), sample) != item_key(vae, sample)


def test_regenerating_replaces_everything(pictures, cache, tmp_path):
    samples = samples_of(dataset_of(pictures), tmp_path / "index")
    fill_alone([MeanEncoder()], samples, cache)
    size = sum(path.stat().st_size for path in cache.rglob("*.shard"))
    vae = MeanEncoder()
    assert fill_alone([vae], samples, cache, regenerate=True) == [report(vae, 6, 0, 6)]
    assert sum(path.stat().st_size for path in cache.rglob("*.shard")) == size


def test_a_broken_file_stops_nothing(pictures, cache, tmp_path):
    whole = (pictures / "002.png").read_bytes()
    (pictures / "002.png").write_bytes(whole[:50])
    samples = samples_of(dataset_of(pictures), tmp_path / "index")
    encoders = [MeanEncoder(), LengthEncoder()]
    reports = fill_alone(encoders, samples, cache, batch_size=3)
    assert [(one.wanted, one.encoded, one.failed) for one in reports] == [(6, 5, 1), (6, 6, 0)]
    assert "002.png: cannot be read" in reports[0].failures[0].reason
    (broken,) = (sample for sample in samples if sample.media.path.stem == "002")
    assert [failure.key for failure in reports[0].failures] == [item_key(encoders[0], broken)]
    (pictures / "002.png").write_bytes(whole)
    mended = samples_of(dataset_of(pictures), tmp_path / "index")
    assert fill_alone(encoders[:1], mended, cache)[0] == report(encoders[0], 6, 5, 1)


def test_an_encoders_own_error_is_raised_and_what_was_done_is_kept(pictures, cache, tmp_path):
    class Breaking(MeanEncoder):
        def encode(self, *, pixels):
            if len(self.batches) == 2:
                raise RuntimeError("out of memory")
            return super().encode(pixels=pixels)

    samples = samples_of(dataset_of(pictures), tmp_path / "index")
    breaking = Breaking()
    with pytest.raises(RuntimeError, match="out of memory"):
        fill_alone([breaking], samples, cache, batch_size=2)
    assert breaking.unloads == 1
    vae = MeanEncoder()
    assert fill_alone([vae], samples, cache) == [report(vae, 6, 4, 2)]


def test_control_images(pictures, cache, tmp_path):
    draw_pictures(tmp_path / "controls", 6, size=(20, 20), captions=False, seed=1)
    directory = DirectorySettings(path=pictures, control_path=tmp_path / "controls")
    dataset = DatasetSettings(resolutions=[32], directory=[directory])
    samples = samples_of(dataset, tmp_path / "index")
    edit = DifferenceEncoder()
    assert fill_alone([edit], samples, cache) == [report(edit, 6, 0, 6)]
    with TensorStore(cache / "edit") as store:
        for sample in samples:
            pixels, control = (load_image(file.path, 32, 32) for file in (sample.media, sample.control))
            found = store.get(item_key(edit, sample))["difference_BC"]
            torch.testing.assert_close(found, (pixels - control).mean(dim=(1, 2, 3)))
    other = replace(samples[0], control=replace(samples[0].control, digest="0" * 32))
    assert item_key(edit, other) != item_key(edit, samples[0])
    with pytest.raises(ValueError, match="000.png: .*set `control_path`"):
        item_key(edit, replace(samples[0], control=None))


def test_says_what_it_did(pictures, cache, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    fill_alone([MeanEncoder()], samples_of(dataset_of(pictures), tmp_path / "index"), cache)
    assert "cache vae: wanted=6 reused=0 encoded=6 failed=0" in caplog.messages


def fill_as_rank(rank, port, dataset, folder, results):
    """One of two processes that fill one cache twice, the second time after one picture has gone bad."""
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, 2, is_master=rank == 0, timeout=timedelta(seconds=60))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    samples = assign(scan(dataset, folder / f"index{rank}", "d"), dataset, FACTS)
    vae = MeanEncoder()
    reports = [
        fill(
            [vae],
            samples,
            folder / "cache",
            Ranks(rank=rank, world_size=2),
            2,
            CPU,
            regenerate=again,
            tag=str(again),
        )
        for again in (False, True)
    ]
    results.put((rank, [(one.wanted, one.reused, one.encoded, one.failed) for (one,) in reports], len(vae.batches)))
    dist.barrier()
    dist.destroy_process_group()


def test_two_ranks_share_the_work(pictures, tmp_path):
    (pictures / "002.png").write_bytes((pictures / "002.png").read_bytes()[:50])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    arguments = (port, dataset_of(pictures), tmp_path, results)
    processes = [context.Process(target=fill_as_rank, args=(rank, *arguments)) for rank in range(2)]
    for process in processes:
        process.start()
    found = sorted(results.get(timeout=60) for _ in processes)
    for process in processes:
        process.join()
    # Three files a rank, in batches of two: two batches, or one where the broken file is a batch of its own.
    totals = [(6, 0, 5, 1), (6, 0, 5, 1)]
    assert [totals_of_rank for _, totals_of_rank, _ in found] == [totals, totals]
    assert all(batches in (2, 4) for _, _, batches in found)
    with TensorStore(tmp_path / "cache" / "vae") as store:
        assert len(store) == 5
