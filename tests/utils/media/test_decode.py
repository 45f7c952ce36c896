"""Files written by Pillow come back as the pixels they hold, whatever their mode and orientation."""

import random

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, ImageOps

from utils.media.decode import MediaError, Probe, load_image, probe, tensor_to_image

RED, BLUE = (255, 0, 0), (0, 0, 255)


def halves(width=40, height=20):
    """Red on the left, blue on the right."""
    image = Image.new("RGB", (width, height), RED)
    image.paste(BLUE, (width // 2, 0, width, height))
    return image


def colour_at(pixels_CFHW, x, y):
    """The RGB levels at (x, y)."""
    return tensor_to_image(pixels_CFHW).getpixel((x, y))


def test_pixels_come_back_exactly_at_their_own_size(tmp_path):
    levels = np.random.default_rng(0).integers(0, 256, (12, 20, 3), dtype=np.uint8)
    Image.fromarray(levels).save(tmp_path / "a.png")
    pixels_CFHW = load_image(tmp_path / "a.png", 20, 12)
    assert pixels_CFHW.shape == (3, 1, 12, 20) and pixels_CFHW.dtype == torch.float32
    expected = torch.from_numpy(levels).permute(2, 0, 1) / 127.5 - 1
    torch.testing.assert_close(pixels_CFHW[:, 0], expected)
    assert (np.array(tensor_to_image(pixels_CFHW)) == levels).all()


def test_scales_to_cover_and_crops_the_centre_as_pillow_does(tmp_path):
    levels = np.random.default_rng(0).integers(0, 256, (60, 100, 3), dtype=np.uint8)
    image = Image.fromarray(levels)
    image.save(tmp_path / "a.png")
    for size in [(32, 32), (80, 24), (16, 64), (200, 200)]:
        expected = np.array(ImageOps.fit(image, size, Image.Resampling.LANCZOS)).astype(int)
        found = np.array(tensor_to_image(load_image(tmp_path / "a.png", *size))).astype(int)
        assert abs(found - expected).max() <= 1


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif", ".webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_honoured(tmp_path, suffix, orientation):
    path = tmp_path / f"a{suffix}"
    image = halves(64, 32)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    image.save(path, exif=exif)
    upright = ImageOps.exif_transpose(Image.open(path))
    found = probe(path)
    assert (found.width, found.height) == upright.size == ((32, 64) if orientation >= 5 else (64, 32))
    pixels_CFHW = load_image(path, *upright.size)
    difference = np.array(tensor_to_image(pixels_CFHW)).astype(int) - np.array(upright.convert("RGB"))
    assert abs(difference).max() <= 1


def transparent(mode):
    image = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    image.paste((0, 0, 0, 255), (0, 0, 4, 8))
    if mode != "P":
        return image.convert(mode), {}
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    palette.paste(0, (0, 0, 4, 8))
    return palette, {"transparency": 1}


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_becomes_white(tmp_path, mode):
    image, options = transparent(mode)
    image.save(tmp_path / "a.png", **options)
    pixels_CFHW = load_image(tmp_path / "a.png", 8, 8)
    assert colour_at(pixels_CFHW, 0, 0) == (0, 0, 0) and colour_at(pixels_CFHW, 7, 7) == (255, 255, 255)


def test_grey_of_8_and_16_bits_is_the_same_picture(tmp_path):
    grey = np.arange(256, dtype=np.uint16).reshape(16, 16)
    Image.fromarray(grey.astype(np.uint8)).save(tmp_path / "8.png")
    Image.fromarray(grey * 257).save(tmp_path / "16.png")
    Image.fromarray(grey * 257).save(tmp_path / "16.tif")
    expected = load_image(tmp_path / "8.png", 16, 16)
    assert expected.min() == -1 and expected.max() == 1
    for name in ["16.png", "16.tif"]:
        assert torch.equal(load_image(tmp_path / name, 16, 16), expected)


def test_cmyk_is_converted(tmp_path):
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "a.jpg", quality=100)
    red, green, blue = colour_at(load_image(tmp_path / "a.jpg", 16, 16), 8, 8)
    assert red > 250 and green < 5 and blue < 5


def test_floating_point_pixels_are_refused(tmp_path):
    Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(MediaError, match="a.tif.*floating-point"):
        load_image(tmp_path / "a.tif", 4, 4)


def test_a_probe_reads_the_header_alone(tmp_path):
    halves().save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:60])
    assert probe(tmp_path / "cut.png") == Probe(40, 20, 1)
    with pytest.raises(MediaError, match="cut.png: cannot be read"):
        load_image(tmp_path / "cut.png", 8, 8)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_any_broken_file_is_a_media_error(tmp_path):
    """Whatever bytes are damaged, the file is read or refused with its name; nothing else is raised."""
    draw = random.Random(0)
    for suffix in [".png", ".jpg", ".webp", ".tif", ".bmp"]:
        path = tmp_path / f"a{suffix}"
        halves().save(path)
        whole = path.read_bytes()
        for _ in range(40):
            broken = bytearray(whole)
            for _ in range(8):
                broken[draw.randrange(len(broken))] = draw.randrange(256)
            path.write_bytes(broken)
            try:
                load_image(path, 8, 8)
            except MediaError as error:
                assert str(path) in str(error)


@pytest.mark.parametrize(("content", "reason"), [(b"hello", "not an image"), (b"", "not an image"), (None, "no such")])
def test_reasons_are_readable(tmp_path, content, reason):
    if content is not None:
        (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(MediaError, match=f"a.png: .*{reason}"):
        probe(tmp_path / "a.png")
