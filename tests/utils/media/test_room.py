"""What is opened at all, and how much memory decoding takes."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from PIL import EpsImagePlugin, Image

from utils.media import decode
from utils.media.decode import decode_all, load_image, probe
from utils.media.geometry import View
from utils.media.images import BYTES_A_PIXEL, FORMATS
from utils.media.memory import LARGE, Room
from utils.media.source import MediaError


def test_postscript_under_another_name_starts_no_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *arguments, **keys: started.append(arguments))
    path = tmp_path / "a.png"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\nshowpage\n%%EOF\n")
    with Image.open(path) as opened:
        assert opened.format == "EPS", "Pillow alone would take it"
    for use in (probe, decode_all, lambda source: load_image(source, View(64, 64))):
        with pytest.raises(MediaError, match="a.png: "):
            use(path)
    assert not started


@pytest.mark.parametrize("form", [form for form in FORMATS if form != "DIB"])
def test_what_is_meant_is_opened_under_any_name(tmp_path: Path, form: str) -> None:
    path = tmp_path / "a.jpg"
    Image.new("RGB", (32, 16), "red").save(path, form)
    assert (probe(path).width, probe(path).height) == (32, 16)
    pixels_CFHW = load_image(path, View(32, 16))
    assert pixels_CFHW[0].min() > 0.8 and pixels_CFHW[1:].max() < -0.8


def test_large_pictures_share_the_room_and_one_alone_may_exceed_it() -> None:
    room, most, now = Room(lambda: 4 * LARGE, lambda: 100 * LARGE), [], []
    lock = threading.Lock()

    def decode_one(size: int) -> None:
        with room.taken(size):
            with lock:
                now.append(size)
                most.append(sum(now) if len(now) > 1 else 0)
            time.sleep(0.01)
            with lock:
                now.remove(size)

    sizes = [LARGE, 3 * LARGE, 9 * LARGE, 2 * LARGE, LARGE] * 3
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(decode_one, sizes))
    assert LARGE < max(most) <= 4 * LARGE and len(most) == len(sizes)


def test_small_pictures_wait_for_none_and_failures_give_the_room_back() -> None:
    room = Room(lambda: LARGE, lambda: 2 * LARGE)
    with room.taken(2 * LARGE), room.taken(LARGE - 1):
        pass
    with pytest.raises(MediaError, match="takes 0.2 GiB to be decoded, and 0.1 GiB of memory are free"):
        with room.taken(3 * LARGE):
            pass
    with pytest.raises(ZeroDivisionError), room.taken(LARGE):
        raise ZeroDivisionError
    with room.taken(2 * LARGE):
        pass


def test_a_picture_is_decoded_within_the_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its size is known from the header, before memory is taken."""
    side = int((LARGE / BYTES_A_PIXEL) ** 0.5) + 1
    large, small = tmp_path / "large.png", tmp_path / "small.png"
    Image.new("L", (side, side)).save(large)
    Image.new("L", (side // 2, side)).save(small)
    monkeypatch.setattr(decode, "ROOM", Room(lambda: LARGE, lambda: LARGE - 1))
    assert probe(large).width == side
    decode_all(small)
    for use in (decode_all, lambda source: load_image(source, View(64, 64))):
        with pytest.raises(MediaError, match=r"large.png: takes 0.1 GiB to be decoded"):
            use(large)
