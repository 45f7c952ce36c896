"""Where what is seen lies in its picture, against a picture whose colours say where its pixels are.

Shapes: C channels, F frames, H height, W width.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from models.foundation.encoders.sizes import SIZES, SizeEncoder
from tests.utils.dataset.conftest import counts, dataset_of, draw_pictures, filled, item, plain_sample, samples_of
from utils.dataset.encoders import inputs_of, item_key
from utils.dataset.samples import Bucket, MediaFile, Take, evaluation_version
from utils.dataset.sources import Locator
from utils.media.decode import load_clip

WIDTH, HEIGHT = 200, 120


def coordinates(place: Path) -> Path:
    """A picture whose red is the column and whose green is the row."""
    picture = Image.new("RGB", (WIDTH, HEIGHT))
    picture.putdata([(x, y, 0) for y in range(HEIGHT) for x in range(WIDTH)])
    picture.save(place / "coordinates.png")
    return place / "coordinates.png"


@pytest.mark.parametrize("bucket", [Bucket(50, 60, 1), Bucket(100, 30, 1)], ids=str)
@pytest.mark.parametrize("crop", ["center", "none", (0.25, 1.0)])
@pytest.mark.parametrize("flip", [False, True])
def test_a_place_is_where_the_first_pixel_is_from(tmp_path: Path, bucket: Bucket, crop, flip: bool) -> None:
    file = coordinates(tmp_path)
    sample = plain_sample(bucket=bucket, takes=(Take(crop=crop, flip=flip),))
    version = evaluation_version(replace(sample, media=MediaFile(Locator(str(file)), "0" * 32, WIDTH, HEIGHT, 1)))
    height, width, top, left, *size = inputs_of(SizeEncoder(), version)["size_and_crop"].tolist()
    assert (height, width, size) == (HEIGHT, WIDTH, [bucket.height, bucket.width])
    pixels_CFHW = load_clip(file, version.take.view(bucket), 0.0, 1, 1.0)
    column, row = ((pixels_CFHW[channel, 0, 0, 0].item() + 1) / 2 * 255 for channel in (0, 1))
    # In the picture as it is mirrored and scaled.
    column = WIDTH - column if flip else column
    scale_x, scale_y = (bucket.width / WIDTH, bucket.height / HEIGHT) if crop == "none" else [scale_of(bucket)] * 2
    assert left == pytest.approx(column * scale_x, abs=1) and top == pytest.approx(row * scale_y, abs=1)


def scale_of(bucket: Bucket) -> float:
    return max(bucket.width / WIDTH, bucket.height / HEIGHT)


def test_places_are_kept_by_what_they_are(tmp_path: Path) -> None:
    """Files of one size share an item, and sizes are encoded like anything else."""
    draw_pictures(tmp_path / "pictures", 3, size=(48, 32))
    draw_pictures(tmp_path / "more", 2, size=(64, 64))
    samples = samples_of(dataset_of(tmp_path / "pictures", tmp_path / "more"), tmp_path / "cache")
    encoder = SizeEncoder()
    assert len({item_key(encoder, evaluation_version(sample)) for sample in samples}) == 2
    assert counts(filled(encoder, samples, tmp_path / "cache")) == (2, 0, 2, 0)
    kept = item(tmp_path / "cache", encoder, evaluation_version(samples[0]))[SIZES]
    assert torch.equal(kept, inputs_of(encoder, evaluation_version(samples[0]))["size_and_crop"])
    (name,) = encoder.feature_shapes(samples[0].bucket)
    assert (name, encoder.feature_shapes(samples[0].bucket)[name]) == (SIZES, (tuple(kept.shape), kept.dtype))
