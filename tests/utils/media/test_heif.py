"""Phones' photographs: HEIF in tiles and AVIF, under any ending, come back whole and upright, or are refused."""

import sys

import av
import numpy as np
import pytest
from PIL import ExifTags, Image, ImageOps
from pillow_heif import HeifFile, from_pillow

from tests.utils.media.clips import WIDTH, numbered, numbers_of
from utils.media.decode import MediaError, Probe, load_alpha, load_clip, load_image, probe
from utils.media.geometry import View
from utils.media.writing import tensor_to_image

QUARTERS = {(220, 20, 20): (0, 0), (20, 220, 20): (128, 0), (20, 20, 220): (0, 128), (220, 220, 20): (128, 128)}


def quarters():
    """256 x 256: a colour for each quarter."""
    image = Image.new("RGB", (256, 256))
    for colour, (x, y) in QUARTERS.items():
        image.paste(colour, (x, y, x + 128, y + 128))
    return image


def difference(path, image):
    """The mean difference of a file from what it should show; edges of colours may be blurred."""
    found = np.array(tensor_to_image(load_image(path, View(*image.size)))).astype(int)
    return abs(found - np.array(image)).mean()


@pytest.mark.parametrize("name", ["IMG_0001.jpg", "IMG_0001.HEIC", "IMG_0001.mp4"])
def test_a_photograph_in_tiles_is_read_whole_whatever_its_ending(tmp_path, name):
    path = tmp_path / name
    with path.open("wb") as file:
        from_pillow(quarters()).save(file, quality=95, tile_size=128, format="HEIF")
    with av.open(str(path)) as container:
        assert len(container.streams.video) == 4
    assert probe(path) == Probe(256, 256, 1)
    assert difference(path, quarters()) < 3


@pytest.mark.parametrize("suffix", [".heic", ".avif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_honoured(tmp_path, suffix, orientation):
    path, exif = tmp_path / f"a{suffix}", Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    image = quarters().crop((64, 0, 256, 256))
    if suffix == ".avif":
        image.save(path, exif=exif, quality=95)
    else:
        from_pillow(image).save(path, exif=exif.tobytes(), quality=95)
    image.getexif()[ExifTags.Base.Orientation] = orientation
    upright = ImageOps.exif_transpose(image)
    assert (probe(path).width, probe(path).height) == upright.size
    assert difference(path, upright) < 3


def test_of_several_pictures_the_main_one_is_meant(tmp_path):
    several = HeifFile()
    for shade in (10, 120, 240):
        several.add_from_pillow(Image.new("RGB", (64, 64), (shade, shade, shade)))
    several.save(tmp_path / "a.heic", primary_index=1, quality=95)
    assert probe(tmp_path / "a.heic") == Probe(64, 64, 1)
    assert difference(tmp_path / "a.heic", Image.new("RGB", (64, 64), (120, 120, 120))) < 5


def test_transparent_becomes_white_and_has_an_alpha(tmp_path):
    image = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    image.paste((0, 0, 0, 255), (0, 0, 32, 64))
    from_pillow(image).save(tmp_path / "a.heic", quality=-1)
    pixels = load_image(tmp_path / "a.heic", View(64, 64))
    assert pixels[..., :24].max() < -0.95 and pixels[..., 40:].min() > 0.95
    alpha = load_alpha(tmp_path / "a.heic", View(64, 64))
    assert alpha[..., :24].min() > 0.95 and alpha[..., 40:].max() < 0.05


@pytest.mark.parametrize(("old", "new"), [(b"hvc1", b"xyz1"), (b"pitm", b"free"), (b"ftypheic", b"ftypisom")])
def test_a_picture_that_cannot_be_read_is_never_taken_for_a_video(tmp_path, old, new):
    path = tmp_path / "a.jpg"
    with path.open("wb") as file:
        from_pillow(quarters()).save(file, tile_size=128, format="HEIF")
    path.write_bytes(path.read_bytes().replace(old, new))
    with pytest.raises(MediaError, match="a.jpg: .*(HEIF picture .* cannot be read|no video in it)"):
        load_image(path, View(64, 64))


def test_without_pillow_heif_its_name_is_told(tmp_path, monkeypatch):
    from_pillow(quarters()).save(tmp_path / "a.heic")
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(MediaError, match="a.heic: .*pip install pillow-heif"):
        probe(tmp_path / "a.heic")


def _two_videos(path, dispositions):
    """A file of two videos: the number 1 in the first, 2 in the second."""
    with av.open(str(path), "w") as container:
        streams = [container.add_stream("ffv1", rate=24) for _ in dispositions]
        for stream, disposition in zip(streams, dispositions, strict=True):
            stream.width, stream.height, stream.pix_fmt = WIDTH, 48, "bgr0"
            stream.disposition = disposition
        for number, stream in enumerate(streams, start=1):
            for _ in range(3):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(numbered(number), "rgb24")))
            container.mux(stream.encode())


@pytest.mark.parametrize(("dispositions", "shown"), [((0, 1), 2), ((1, 0), 1)])
def test_the_video_that_players_show_is_taken(tmp_path, dispositions, shown):
    path = tmp_path / "a.mkv"
    _two_videos(path, dispositions)
    assert probe(path).frames == 3
    assert numbers_of(load_clip(path, View(WIDTH, 48), 0, 3, 24)) == [shown] * 3
