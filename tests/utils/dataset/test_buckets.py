"""Buckets against sizes worked out by hand."""

import math
from dataclasses import replace
from pathlib import Path

import pytest

from utils.dataset.buckets import Bucket, BucketLine, MediaFacts, assign, by_bucket, format_table, table
from utils.dataset.manifest import Manifest, MediaFile, Row
from utils.dataset.ordering import epoch_order
from utils.settings.schema import DatasetSettings, DirectorySettings

FACTS = MediaFacts(spatial=16)


def media(width, height, frames=1, digest="d"):
    return MediaFile(Path(f"/data/{digest}.png"), digest * 32, width, height, frames)


def assigned(files, facts=FACTS, repeats=1, **keys):
    """The samples of files, each captioned "x"."""
    rows = [Row(file, "x", None, 0, repeats) for file in files]
    dataset = DatasetSettings(**keys, directory=[DirectorySettings(path=Path("/data"))])
    return assign(Manifest(rows, [], []), dataset, facts)


def buckets(file, facts=FACTS, **keys):
    return [str(sample.bucket) for sample in assigned([file], facts, **keys)]


def test_without_aspect_ratios_a_side_is_a_square_and_a_pair_is_itself():
    assert buckets(media(300, 100), resolutions=[512, (768, 500)]) == ["512x512x1", "768x496x1"]


def test_each_resolution_once_at_the_nearest_shape():
    keys = {
        "resolutions": [512, 1024],
        "enable_ar_bucket": True,
        "min_ar": 0.5,
        "max_ar": 2.0,
        "num_ar_buckets": 3,
    }
    # sqrt(2) * 512 = 724.1 -> 720 and 512 / sqrt(2) = 362.04 -> 368, in multiples of 16.
    assert buckets(media(2000, 1000), **keys) == ["720x368x1", "1456x720x1"]
    assert buckets(media(1000, 2000), **keys) == ["368x720x1", "720x1456x1"]
    assert buckets(media(1010, 1000), **keys) == ["512x512x1", "1024x1024x1"]
    assert buckets(media(9000, 1000), **keys) == ["720x368x1", "1456x720x1"]


def test_ratios_are_spaced_evenly_in_logarithm():
    keys = {
        "resolutions": [4096],
        "enable_ar_bucket": True,
        "min_ar": 0.25,
        "max_ar": 4.0,
        "num_ar_buckets": 5,
    }
    found = [assigned([media(1000 * r, 1000)], **keys)[0].bucket for r in (0.25, 0.5, 1, 2, 4)]
    assert [bucket.width / bucket.height for bucket in found] == pytest.approx([0.25, 0.5, 1, 2, 4], rel=0.01)
    assert [math.sqrt(bucket.width * bucket.height) for bucket in found] == pytest.approx([4096] * 5, rel=0.01)


def test_explicit_ratios_and_sizes():
    keys = {"resolutions": [512], "enable_ar_bucket": True, "ar_buckets": [1.0, (2, 1)]}
    assert buckets(media(300, 100), **keys) == ["720x368x1"]
    assert buckets(media(100, 300), **keys) == ["512x512x1"]
    sizes = {"size_buckets": [(640, 480, 1), (480, 640, 1), (640, 480, 33)]}
    assert buckets(media(400, 300), **sizes) == ["640x480x1"]
    assert buckets(media(300, 400), **sizes) == ["480x640x1"]


def test_nearest_is_by_ratio_and_not_by_difference():
    """1.0 is nearer to 2.0 than to 0.45, though the difference says otherwise."""
    keys = {"resolutions": [512], "enable_ar_bucket": True, "ar_buckets": [0.45, 2.0]}
    assert buckets(media(100, 100), **keys) == ["720x368x1"]


def test_resolutions_that_round_to_one_size_count_once():
    assert buckets(media(100, 100), resolutions=[512, 513]) == ["512x512x1"]


def test_frames():
    facts = MediaFacts(spatial=16, temporal=4, max_frames=81)
    keys = {"resolutions": [512], "frame_buckets": [1, 33, 40, 200]}
    assert [buckets(media(100, 100, frames), facts, **keys)[0] for frames in (1, 32, 34, 50, 300)] == [
        f"512x512x{frames}" for frames in (1, 1, 33, 37, 81)
    ]
    assert buckets(media(100, 100), facts, resolutions=[512], frame_buckets=[33]) == ["512x512x1"]
    with pytest.raises(ValueError, match="d.png: no bucket fits a file of 1 frame"):
        buckets(media(100, 100), facts, size_buckets=[(512, 512, 33)])


def test_ids_are_unique_and_say_what_the_sample_is():
    twin = replace(media(100, 100), path=Path("/other/d.png"))
    samples = assigned([media(100, 100), twin, media(100, 100, digest="e")], repeats=2, resolutions=[512])
    ids = [sample.id for sample in samples]
    assert len(set(ids)) == 6
    assert [one.rsplit("-", 1)[1] for one in ids] == ["0", "1", "2", "3", "0", "1"]
    assert ids[0].startswith("d" * 16 + "-") and ids[0].endswith("-512x512x1-0")
    other = assign(
        Manifest([Row(media(100, 100), "y", None, 0, 1)], [], []),
        DatasetSettings(resolutions=[512], directory=[DirectorySettings(path=Path("/data"))]),
        FACTS,
    )
    assert other[0].id not in ids


def test_directories_keep_their_own_settings():
    own = DirectorySettings(path=Path("/b"), resolutions=[256])
    dataset = DatasetSettings(resolutions=[512], directory=[DirectorySettings(path=Path("/a")), own])
    rows = [Row(media(100, 100), "x", None, directory, 1) for directory in (0, 1)]
    samples = assign(Manifest(rows, [], []), dataset, FACTS)
    assert [sample.bucket for sample in samples] == [Bucket(512, 512, 1), Bucket(256, 256, 1)]


def test_the_table_counts_what_the_order_does():
    files = [media(100, 100, digest=letter) for letter in "abcde"] + [media(300, 100, digest="f")]
    samples = assigned(files, repeats=2, resolutions=[512], enable_ar_bucket=True, ar_buckets=[1.0, 3.0])
    lines = table(samples, micro_batch=2, data_ranks=2, accumulation=3)
    wide, square = Bucket(880, 288, 1), Bucket(512, 512, 1)
    assert lines == [
        BucketLine(square, 5, 10, 3, 2),
        BucketLine(wide, 1, 2, 1, 2),
        BucketLine(None, 6, 12, 6, 12),
    ]
    sizes = [len(group) for group in by_bucket(samples).values()]
    steps = epoch_order(sizes, 2, 2, 3, seed=0, epoch=0)
    assert sum(len(step) for step in steps) == lines[-1].batches
    assert sum(slot.fill for step in steps for slot in step) == lines[-1].fill
    text = format_table(lines).splitlines()
    assert text[1].split() == ["512x512x1", "5", "10", "3", "2"] and text[3].split()[0] == "total"
    assert len({len(line) for line in text}) == 1
