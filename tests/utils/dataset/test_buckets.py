"""Buckets against sizes worked out by hand."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.utils.dataset.conftest import CLIP_FACTS, FACTS
from utils.dataset.buckets import LeftOut, MediaFacts, assign, by_shape
from utils.dataset.manifest import Row
from utils.dataset.samples import Bucket, Mask, MediaFile, Take, appearances_before, repeat_phase
from utils.dataset.sources import Locator
from utils.settings.dataset_schema import DatasetSettings, DirectorySettings


def media(width, height, frames=1, digest="d", fps=None):
    name = f"{digest}.png" if frames == 1 else f"{digest}.mp4"
    fps = (16.0 if frames > 1 else 0.0) if fps is None else fps
    return MediaFile(Locator(f"/data/{name}"), digest * 32, width, height, frames, fps)


def row(file, captions=("x",), directory=0, **parts):
    return Row(file, captions, parts.pop("controls", ()), parts.pop("mask", None), directory, **parts)


def assigned(files, facts=FACTS, rows=(), **keys):
    """What is made of files, each captioned "x", and of rows."""
    dataset = DatasetSettings(**{"resolutions": [512], **keys}, directory=[DirectorySettings(path=Path("/data"))])
    return assign([*(row(file) for file in files), *rows], dataset, facts)


def buckets(file, facts=FACTS, **keys):
    found = assigned([file], facts, **keys)
    assert found.samples or found.left_out
    return [str(sample.bucket) for sample in found.samples]


def reasons(file, facts=FACTS, **keys):
    return [one.reason for one in assigned([file], facts, **keys).left_out]


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
    found = [assigned([media(int(1000 * r), 1000)], **keys).samples[0].bucket for r in (0.25, 0.5, 1, 2, 4)]
    assert [bucket.width / bucket.height for bucket in found] == pytest.approx([0.25, 0.5, 1, 2, 4], rel=0.01)
    assert [math.sqrt(bucket.width * bucket.height) for bucket in found] == pytest.approx([4096] * 5, rel=0.01)


def test_explicit_ratios_and_sizes():
    keys = {"enable_ar_bucket": True, "ar_buckets": [1.0, (2, 1)]}
    assert buckets(media(300, 100), **keys) == ["720x368x1"]
    assert buckets(media(100, 300), **keys) == ["512x512x1"]
    sizes = {"resolutions": [], "size_buckets": [(640, 480, 1), (480, 640, 1), (640, 480, 33)]}
    assert buckets(media(400, 300), **sizes) == ["640x480x1"]
    assert buckets(media(300, 400), **sizes) == ["480x640x1"]
    assert buckets(media(300, 400, 40), CLIP_FACTS, **sizes) == ["640x480x33"]


def test_nearest_is_by_ratio_and_not_by_difference():
    """1.0 is nearer to 2.0 than to 0.45, though the difference says otherwise."""
    assert buckets(media(100, 100), enable_ar_bucket=True, ar_buckets=[0.45, 2.0]) == ["720x368x1"]


def test_resolutions_that_round_to_one_size_count_once():
    assert buckets(media(100, 100), resolutions=[512, 513]) == ["512x512x1"]


def test_the_longest_bucket_that_a_clip_fills():
    keys = {"frame_buckets": [1, 33, 40, 200]}
    found = [buckets(media(100, 100, frames), CLIP_FACTS, **keys) for frames in (33, 36, 37, 80, 81, 300)]
    # The model takes 37 frames of 40, and 81 of 200.
    assert found == [[f"512x512x{frames}"] for frames in (33, 33, 37, 37, 81, 81)]


def test_stills_among_clips_are_stills():
    assert buckets(media(100, 100), CLIP_FACTS, frame_buckets=[33]) == ["512x512x1"]


@pytest.mark.parametrize(
    ("file", "keys", "facts", "reason"),
    [
        (
            media(100, 100, 113, fps=24.0),
            {"frame_buckets": [81]},
            CLIP_FACTS,
            "113 frames at 24 fps = 75 at 16 fps, and the shortest bucket has 81",
        ),
        (
            media(100, 100, 113, fps=24.0),
            {"frame_buckets": [33], "framerate": 4.0},
            CLIP_FACTS,
            "113 frames at 24 fps = 18 at 4 fps, and the shortest bucket has 33",
        ),
        (
            media(100, 100, 40, fps=16.0),
            {},
            CLIP_FACTS,
            "40 frames at 16 fps = 40 at 16 fps, and no bucket has more than one; set frame_buckets",
        ),
        (
            media(100, 100, 40, fps=16.0),
            {"frame_buckets": [3]},
            CLIP_FACTS,
            "40 frames at 16 fps = 40 at 16 fps, and no bucket has more than one; set frame_buckets",
        ),
        (
            media(100, 100, 40),
            {"frame_buckets": [33]},
            FACTS,
            "a clip, and this model is trained on still pictures alone",
        ),
        (
            media(100, 100),
            {"resolutions": [], "size_buckets": [(512, 512, 33)]},
            CLIP_FACTS,
            "no bucket is for still pictures; add one of 1 frame to size_buckets, or set resolutions",
        ),
        (media(99, 101), {"min_resolution": 100}, FACTS, "99x101 pixels are fewer than min_resolution = 100 squared"),
        (media(101, 101), {"max_resolution": 100}, FACTS, "101x101 pixels are more than max_resolution = 100 squared"),
        (media(15, 40), {"no_upscale": True}, FACTS, "15x40 pixels are fewer than one cell of 16x16"),
    ],
)
def test_what_is_left_out_and_why(file, keys, facts, reason):
    assert assigned([file], facts, **keys).samples == []
    assert assigned([file], facts, **keys).left_out == [LeftOut(str(file.locator), reason, is_used=False)]


@settings(max_examples=200)
@given(st.integers(2, 400), st.floats(5, 60), st.lists(st.integers(1, 100), min_size=1, max_size=4))
def test_a_clip_is_never_trained_as_a_still(frames, fps, counts):
    found = assigned([media(100, 100, frames, fps=fps)], CLIP_FACTS, frame_buckets=counts)
    assert all(sample.bucket.frames > 1 and sample.fps == 16.0 for sample in found.samples)
    assert found.samples or not found.left_out[0].is_used


def test_the_limits_of_size_belong_to_what_is_used():
    assert buckets(media(100, 100), min_resolution=100, max_resolution=100) == ["512x512x1"]


@pytest.mark.parametrize(
    ("mode", "frames", "reason"),
    [
        ("single_beginning", 73, "113 frames at 24 fps = 75 at 16 fps, bucket 73"),
        ("single_middle", 73, "113 frames at 24 fps = 75 at 16 fps, bucket 73"),
        ("single_random", 33, "113 frames at 24 fps = 75 at 16 fps, bucket 33"),
        ("chunks", 33, "113 frames at 24 fps = 75 at 16 fps, bucket 33 x 2 clips"),
        ("chunks", 25, None),
        ("multiple_overlapping", 33, None),
        ("single_beginning", 76, "113 frames at 24 fps = 75 at 16 fps, bucket 73"),
    ],
)
def test_what_is_cut_short(mode, frames, reason):
    """113 frames at 24 are 75 at 16 frames a second; the model takes 73 of 75."""
    file = media(100, 100, 113, fps=24.0)
    found = assigned([file], CLIP_FACTS, frame_buckets=[frames], video_clip_mode=mode)
    assert found.left_out == ([LeftOut(str(file.locator), reason, is_used=True)] if reason else [])


@pytest.mark.parametrize(
    ("mode", "starts"),
    [
        ("single_beginning", [0.0]),
        ("single_middle", [(75 - 33) // 2 / 16]),
        ("chunks", [0.0, 33 / 16]),
        ("multiple_overlapping", [0.0, 21 / 16, 42 / 16]),
    ],
)
def test_the_clips_of_a_file(mode, starts):
    file = media(100, 100, 113, fps=24.0)
    samples = assigned([file], CLIP_FACTS, frame_buckets=[33], video_clip_mode=mode).samples
    assert [sample.takes for sample in samples] == [(Take(start=start),) for start in starts]
    assert len({sample.id for sample in samples}) == len(samples)
    assert {sample.fps for sample in samples} == {16.0}


def test_random_clips_differ_by_version_and_lie_in_the_file():
    keys = {"frame_buckets": [33], "video_clip_mode": "single_random", "augment_variants": 8}
    (sample,) = assigned([media(100, 100, 200)], CLIP_FACTS, **keys).samples
    starts = [take.start for take in sample.takes]
    assert len(set(starts)) > 4 and all(0 <= start <= (200 - 33) / 16 for start in starts)
    assert assigned([media(100, 100, 200)], CLIP_FACTS, **keys).samples == [sample]


def test_nothing_is_made_larger():
    keys = {"resolutions": [256, 512], "no_upscale": True}
    assert buckets(media(1000, 600), **keys) == ["256x256x1", "512x512x1"]
    assert buckets(media(1000, 300), **keys) == ["256x256x1", "288x288x1"]
    assert buckets(media(200, 200), **keys) == ["192x192x1"]
    assert buckets(media(144, 400), **keys, enable_ar_bucket=True, ar_buckets=[0.5]) == ["144x288x1"]


@given(
    st.integers(1, 3000),
    st.integers(1, 3000),
    st.sampled_from([256, 512, 1024, (768, 512)]),
    st.sampled_from([8, 16, 32]),
)
def test_no_upscale_gives_the_largest_size_that_the_file_fills(width, height, resolution, spatial):
    facts = MediaFacts(spatial)
    (asked,) = assigned([media(width, height)], facts, resolutions=[resolution]).samples
    found = assigned([media(width, height)], facts, resolutions=[resolution], no_upscale=True).samples
    scale = min(1, width / asked.bucket.width, height / asked.bucket.height)
    exact = [side * scale for side in (asked.bucket.width, asked.bucket.height)]
    if not found:
        assert min(exact) < spatial
        return
    bucket = found[0].bucket
    assert bucket.width <= width and bucket.height <= height
    for side, most in zip((bucket.width, bucket.height), exact, strict=True):
        assert side % spatial == 0 and most - spatial - 1e-6 < side <= most + 1e-6


def test_one_take_of_what_is_not_varied():
    (sample,) = assigned([media(100, 100)], augment_variants=4).samples
    assert sample.takes == (Take("center"),)
    (whole,) = assigned([media(100, 100)], crop="none").samples
    assert whole.takes == (Take("none"),)


def test_flips_alternate():
    files = [media(100, 100, digest=letter) for letter in "0123456789abcdef"]
    flips = [tuple(take.flip for take in s.takes) for s in assigned(files, flip=True, augment_variants=2).samples]
    assert set(flips) == {(False, True), (True, False)}
    (sample,) = assigned([media(100, 100)], flip=True, augment_variants=5, crop="random").samples
    assert sum(take.flip for take in sample.takes) in (2, 3)


def test_random_crops_and_colours():
    keys = {"augment_variants": 40, "crop": "random", "color_jitter": (0.1, 0.2, 0.0, 0.03)}
    first, second = assigned([media(100, 50), media(100, 50, digest="e")], **keys).samples
    assert len(set(first.takes)) == 40 and not set(first.takes) & set(second.takes)
    for axis in (0, 1):
        locators = [take.crop[axis] for take in first.takes]
        assert min(locators) < 0.2 and max(locators) > 0.8 and all(0 <= locator < 1 for locator in locators)
    for name, middle, width in (("brightness", 1, 0.1), ("contrast", 1, 0.2), ("saturation", 1, 0), ("hue", 0, 0.03)):
        changes = [getattr(take.jitter, name) - middle for take in first.takes]
        assert all(abs(change) <= width + 1e-12 for change in changes)
        assert not width or (min(changes) < -width / 2 and max(changes) > width / 2)


def test_what_is_drawn_depends_on_the_file_alone():
    keys = {"augment_variants": 3, "crop": "random", "flip": True}
    alone = assigned([media(100, 50)], **keys).samples[0]
    moved = replace(media(100, 50), locator=Locator("/elsewhere/x.png"))
    others = [media(64, 64, digest="a"), moved, media(64, 64, digest="b")]
    assert assigned(others, **keys).samples[1].takes == alone.takes


def test_ids_are_unique_and_say_what_the_sample_is():
    twin = replace(media(100, 100), locator=Locator("/other/d.png"))
    files = [media(100, 100), twin, twin, media(100, 100, digest="e")]
    ids = [sample.id for sample in assigned(files, resolutions=[512, 256]).samples]
    assert len(set(ids)) == 8
    assert ids[0].startswith("d" * 16 + "-") and ids[0].endswith("-512x512x1")
    (other,) = assigned([], rows=[row(media(100, 100), ("y",))]).samples
    assert other.id not in ids


def test_ids_of_clips_of_one_content_in_two_files():
    twin = replace(media(100, 100, 200), locator=Locator("/other/d.mp4"))
    keys = {"frame_buckets": [33], "video_clip_mode": "chunks"}
    ids = [sample.id for sample in assigned([media(100, 100, 200), twin, twin], CLIP_FACTS, **keys).samples]
    assert len(ids) == 18 and len(set(ids)) == 18


def test_captions():
    rows = [row(media(100, 100), ("one", "two", "one"))]
    (drawn,) = assigned([], rows=rows).samples
    assert drawn.captions == ("one", "two")
    (first,) = assigned([], rows=rows, multiple_captions="first", caption_prefix="a ").samples
    assert first.captions == ("a one",)
    each = assigned([], rows=rows, multiple_captions="all").samples
    assert [sample.captions for sample in each] == [("one",), ("two",), ("one",)]
    assert len({sample.id for sample in each}) == 3


@pytest.mark.parametrize(("mode", "captions"), [("random", [("one", "two")]), ("first", [("one",)])])
def test_captions_for_versions_to_be_made_later(mode, captions):
    dataset = DatasetSettings(
        resolutions=[512],
        caption_prefix="a ",
        multiple_captions=mode,
        directory=[DirectorySettings(path=Path("/data"))],
    )
    found = assign([row(media(100, 100), ("one", "two", "one"))], dataset, FACTS, caption_versions=False)
    assert [sample.captions for sample in found.samples] == captions


def test_directories_keep_their_own_settings():
    own = DirectorySettings(path=Path("/b"), resolutions=[256], num_repeats=3, no_upscale=True, min_resolution=50)
    dataset = DatasetSettings(resolutions=[512], directory=[DirectorySettings(path=Path("/a")), own])
    files = [media(100, 100), media(40, 40, digest="e")]
    found = assign([row(file, directory=directory) for directory in (0, 1) for file in files], dataset, FACTS)
    assert [(str(sample.bucket), sample.repeats) for sample in found.samples] == [
        ("512x512x1", 1),
        ("512x512x1", 1),
        ("96x96x1", 3),
    ]
    assert [one.reason for one in found.left_out] == ["40x40 pixels are fewer than min_resolution = 50 squared"]


@pytest.mark.parametrize(("count", "repeats"), [(2, 0.5), (11, 0.3), (40, 0.1), (7, 2.4), (3, 0.9)])
def test_each_epoch_has_its_share_of_what_is_used_a_fraction_of_a_time(count, repeats):
    """As many in every epoch, but for rounding; and each sample as often as it should be."""
    rows = [row(media(100, 100, digest=f"{number:016d}")) for number in range(count)]
    samples = assigned([], rows=rows, num_repeats=repeats).samples
    for seed in range(5):
        phases = np.array([repeat_phase(sample, seed) for sample in samples])
        version = np.array([appearances_before(repeats, phases, epoch) for epoch in range(41)])
        of_epochs = np.diff(version, axis=0).sum(axis=1)
        assert np.abs(of_epochs - count * repeats).max() < 1
        assert np.abs(version[40] - 40 * repeats).max() <= 1
    orders = {tuple(np.argsort([repeat_phase(sample, seed) for sample in samples])) for seed in range(20)}
    assert len(orders) > 1


def test_repeats_of_a_row_multiply_those_of_its_directory():
    (sample,) = assigned([], rows=[row(media(100, 100), repeats=0.5)], num_repeats=3).samples
    assert sample.repeats == 1.5


def test_regularisation_data_appears_as_often_as_the_rest():
    directories = [
        DirectorySettings(path=Path("/a"), num_repeats=2),
        DirectorySettings(path=Path("/b"), is_regularisation_data=True),
    ]
    files = [media(100, 100, digest=letter) for letter in "0123456789"]
    rows = [row(file, directory=int(number >= 3)) for number, file in enumerate(files)]
    samples = assign(rows, DatasetSettings(resolutions=[512], directory=directories), FACTS).samples
    assert [sample.repeats for sample in samples] == pytest.approx([2] * 3 + [6 / 7] * 7)
    alone = assign(rows[3:], DatasetSettings(resolutions=[512], directory=directories), FACTS).samples
    assert {sample.repeats for sample in alone} == {1}


def test_controls_have_their_own_size_in_the_shape_of_the_target():
    rows = [row(media(200, 100), controls=(media(50, 50, digest="c"), media(30, 90, digest="e")))]
    keys = {"enable_ar_bucket": True, "ar_buckets": [2.0], "resolutions": [512]}
    (sample,) = assigned([], rows=rows, **keys).samples
    assert [str(control.bucket) for control in sample.controls] == ["720x368x1"] * 2
    (small,) = assigned([], rows=rows, **keys, control_resolution=256).samples
    # 720 and 368, scaled by 256 / sqrt(720 * 368): 358.08 and 183.02.
    assert [str(control.bucket) for control in small.controls] == ["352x176x1"] * 2
    clip = row(media(200, 100, 40), controls=(media(50, 50, digest="c"),))
    (moving,) = assigned([], CLIP_FACTS, rows=[clip], frame_buckets=[33]).samples
    assert str(moving.bucket) == "512x512x33" and str(moving.controls[0].bucket) == "512x512x1"


def test_controls_that_are_read_as_clips_are_no_longer_than_the_sample():
    clip = row(media(200, 100, 40), controls=[media(50, 50, frames, digest="c") for frames in (1, 30, 99, 3)])
    (sample,) = assigned([], replace(CLIP_FACTS, control_clips=True), rows=[clip], frame_buckets=[33]).samples
    assert [control.bucket.frames for control in sample.controls] == [1, 29, 33, 1]


def test_masks_and_rules_come_along():
    mask = Mask(media(20, 20, digest="c"), is_alpha=False)
    (sample,) = assigned([], rows=[row(media(100, 100), mask=mask)], loss_weight=0.5).samples
    assert sample.mask == mask and sample.rules.loss_weight == 0.5


def test_samples_of_one_shape_are_grouped_in_ascending_order():
    files = [media(100, 100), media(300, 100, digest="e"), media(100, 100, digest="f")]
    rows = [row(media(100, 100, digest="g"), controls=(media(10, 10, digest="c"),))]
    samples = assigned(files, rows=rows, enable_ar_bucket=True, ar_buckets=[1.0, 3.0]).samples
    square, wide = Bucket(512, 512, 1), Bucket(880, 288, 1)
    assert {shape: [sample.media.digest[0] for sample in group] for shape, group in by_shape(samples).items()} == {
        (square,): ["d", "f"],
        (square, square): ["g"],
        (wide,): ["e"],
    }
    assert list(by_shape(samples)) == sorted(by_shape(samples))
