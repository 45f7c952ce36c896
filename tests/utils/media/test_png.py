"""PNGs with texts longer than Pillow reads, or with broken ones, are the pictures that they are."""

import struct
import zlib

import pytest
from PIL import Image

from tests.utils.media.test_decode import BLUE, RED, colour_at, halves
from utils.media.decode import Probe, load_image, probe
from utils.media.geometry import View


def with_chunk(path, kind, content, at_end):
    """Puts a chunk before or behind the pixels of a PNG."""
    whole = path.read_bytes()
    place = len(whole) - 12 if at_end else 33
    chunk = struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    path.write_bytes(whole[:place] + chunk + whole[place:])


@pytest.mark.parametrize("at_end", [False, True])
@pytest.mark.parametrize("kind", [b"zTXt", b"iTXt", b"iCCP", b"tEXt"])
def test_pictures_with_very_long_texts_are_read(tmp_path, kind, at_end):
    path = tmp_path / "a.png"
    halves().save(path)
    packed = zlib.compress(bytes(3_000_000))
    starts = {b"zTXt": b"workflow\0\0", b"iTXt": b"workflow\0\1\0\0\0", b"iCCP": b"profile\0\0"}
    with_chunk(path, kind, starts[kind] + packed if kind in starts else b"x\0" + b" " * 2**26, at_end)
    # How the picture is turned is said in a text too.
    turned = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf tiff:Orientation="3"/></x:xmpmeta>'
    with_chunk(path, b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + turned, at_end=False)
    with pytest.raises(ValueError, match="[Tt]oo (large|much)"):
        Image.open(path).load()
    assert probe(path) == Probe(40, 20, 1)
    pixels = load_image(path, View(40, 20))
    assert colour_at(pixels, 0, 0) == BLUE and colour_at(pixels, 39, 0) == RED


def test_what_is_broken_behind_the_pixels_of_a_png_does_not_matter(tmp_path):
    halves().save(tmp_path / "a.png")
    with_chunk(tmp_path / "a.png", b"tEXt", b"a\0" + bytes(100), at_end=True)
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:-60])
    with pytest.raises(OSError, match="Truncated"):
        Image.open(tmp_path / "a.png").load()
    assert colour_at(load_image(tmp_path / "a.png", View(40, 20)), 0, 0) == RED
