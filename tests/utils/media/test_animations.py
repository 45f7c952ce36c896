"""Animated pictures that Pillow wrote: their frames, how long each is shown, and clips of them."""

import re

import numpy as np
import pytest
import torch
from PIL import Image

from tests.utils.media.clips import numbered, numbers_of
from utils.media.decode import load_alpha, load_clip, load_image, probe
from utils.media.geometry import View
from utils.media.source import MediaError, Probe

SMALL = View(64, 48)
MILLISECONDS = [50, 100, 200, 50, 400, 50, 50, 100]
FORMATS = ["gif", "webp", "png", "avif"]


def animate(path, milliseconds=MILLISECONDS, first=0, **options):
    frames = [Image.fromarray(numbered(first + index)) for index in range(len(milliseconds))]
    lossless = {"lossless": True} if path.suffix == ".webp" else {}
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=milliseconds, **lossless, **options)
    return path


@pytest.mark.parametrize("suffix", FORMATS)
def test_frames_and_their_durations(tmp_path, suffix):
    path = animate(tmp_path / f"a.{suffix}")
    assert probe(path) == Probe(64, 48, 8, 8)
    ends = np.cumsum(MILLISECONDS) / 1000
    for start, fps, count in [(0, 20, 20), (0.2, 20, 10), (0, 8, 8), (0.3, 100, 50)]:
        expected = [int((ends > start + index / fps + 1e-6).argmax()) for index in range(count)]
        assert numbers_of(load_clip(path, SMALL, start, count, fps)) == expected
    assert numbers_of(load_image(path, SMALL)) == [0]
    with pytest.raises(MediaError, match=f"a.{suffix}: ends after 1.000 s"):
        load_clip(path, SMALL, 0.5, 12, 20)


def test_a_frame_without_a_duration_is_shown_for_a_tenth_of_a_second(tmp_path):
    assert probe(animate(tmp_path / "a.gif", [0, 0, 0])) == Probe(64, 48, 3, 10)


def test_the_picture_for_others_is_no_frame_of_an_animated_png(tmp_path):
    frames = [Image.fromarray(numbered(number)) for number in (200, 1, 2, 3)]
    options = {"save_all": True, "append_images": frames[1:], "default_image": True}
    frames[0].save(tmp_path / "a.png", duration=100, **options)
    assert probe(tmp_path / "a.png") == Probe(64, 48, 3, 10)
    assert numbers_of(load_clip(tmp_path / "a.png", SMALL, 0, 3, 10)) == [1, 2, 3]
    assert numbers_of(load_image(tmp_path / "a.png", SMALL)) == [1]


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_transparent_animations_are_on_white(tmp_path, suffix):
    frames = []
    for left in (0, 20, 40):
        frame = Image.new("RGBA", (60, 8))
        frame.paste((255, 0, 0, 255), (left, 0, left + 20, 8))
        # Frames that are opaque but for empty borders would be written without transparency as WebP.
        frame.paste((0, 0, 0, 0), (left, 0, left + 10, 4))
        frames.append(frame)
    options = {"save_all": True, "append_images": frames[1:], "duration": 100, "disposal": 2}
    path = tmp_path / f"a.{suffix}"
    frames[0].save(path, **options, **({"lossless": True} if suffix == "webp" else {}))
    alpha = torch.zeros(1, 3, 8, 60)
    for index, left in enumerate((0, 20, 40)):
        alpha[:, index, :, left : left + 20] = 1
        alpha[:, index, :4, left : left + 10] = 0
    torch.testing.assert_close(load_alpha(path, View(60, 8), 0, 3, 10), alpha)
    pixels = load_clip(path, View(60, 8), 0, 3, 10)
    torch.testing.assert_close(pixels, torch.cat([torch.ones_like(alpha), 1 - 2 * alpha, 1 - 2 * alpha]))


@pytest.mark.parametrize("suffix", ["gif", "png"])
def test_an_animation_that_is_broken_behind_its_first_frame_is_a_picture(tmp_path, suffix):
    path = animate(tmp_path / f"a.{suffix}")
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 6 // 10])
    found = probe(path)
    assert (found.width, found.height, found.frames, found.fps) == (64, 48, 1, 0)
    assert re.match(r"is broken behind frame [3-6] \(.+\)$", found.fault)
    assert numbers_of(load_image(path, SMALL)) == [0]


def test_a_truncated_animation_is_read_or_refused(tmp_path):
    for suffix in FORMATS:
        path = animate(tmp_path / f"a.{suffix}")
        content = path.read_bytes()
        for size in range(0, len(content), max(1, len(content) // 20)):
            path.write_bytes(content[:size])
            try:
                load_clip(path, SMALL, 0, 20, 20)
            except MediaError as error:
                assert str(path) in str(error)
