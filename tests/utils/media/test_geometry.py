"""Sizes and boxes against numbers worked out by hand, and against what must hold for any."""

import json
import random

import pytest

from utils.media.colour import Jitter
from utils.media.geometry import View, cover_box, round_to_multiple, same_shape


@pytest.mark.parametrize(("value", "multiple", "expected"), [(100, 16, 96), (105, 16, 112), (3, 16, 16), (64, 64, 64)])
def test_round_to_multiple(value, multiple, expected):
    assert round_to_multiple(value, multiple) == expected


def test_cover_box_by_hand():
    assert cover_box(200, 100, 50, 50) == (50, 0, 150, 100)
    assert cover_box(100, 200, 64, 32) == (0, 75, 100, 125)
    assert cover_box(10, 10, 100, 100) == (0, 0, 10, 10)


def test_cover_box_is_the_largest_centred_box_of_the_shape():
    draw = random.Random(0)
    for _ in range(2000):
        width, height, target_width, target_height = (draw.randint(1, 5000) for _ in range(4))
        left, top, right, bottom = cover_box(width, height, target_width, target_height)
        assert 0 <= left < right <= width and 0 <= top < bottom <= height
        assert left + right == pytest.approx(width) and top + bottom == pytest.approx(height)
        assert (right - left) / (bottom - top) == pytest.approx(target_width / target_height)
        assert right - left == pytest.approx(width) or bottom - top == pytest.approx(height)


def test_a_place_divides_what_is_cut_off():
    draw = random.Random(0)
    for _ in range(2000):
        width, height, target_width, target_height = (draw.randint(1, 5000) for _ in range(4))
        place = draw.choice([0.0, 1.0, draw.random()]), draw.choice([0.0, 1.0, draw.random()])
        left, top, right, bottom = cover_box(width, height, target_width, target_height, place)
        centre = cover_box(width, height, target_width, target_height)
        assert 0 <= left < right <= width and 0 <= top < bottom <= height
        assert (right - left, bottom - top) == pytest.approx((centre[2] - centre[0], centre[3] - centre[1]))
        assert left == pytest.approx(place[0] * (left + width - right), abs=1e-6)
        assert top == pytest.approx(place[1] * (top + height - bottom), abs=1e-6)


def test_identities_are_the_same_for_equal_views_alone():
    views = [
        View(64, 48),
        View(48, 64),
        View(64, 48, "none"),
        View(64, 48, (0.5, 0.5)),
        View(64, 48, (0.25, 1)),
        View(64, 48, flip=True),
        View(64, 48, jitter=Jitter(brightness=1.1)),
        View(64, 48, jitter=Jitter(contrast=1.1)),
        View(64, 48, jitter=Jitter(saturation=1.1)),
        View(64, 48, jitter=Jitter(hue=0.1)),
        View(64, 48, "pad"),
        View(64, 48, on=(100, 30)),
    ]
    assert len({json.dumps(view.identity) for view in views}) == len(set(views)) == len(views)
    assert json.dumps(View(64, 48, (0, 1)).identity) == json.dumps(View(64, 48, (0.0, 1.0)).identity)
    assert View(64, 48, (0.25, 1)).identity == [64, 48, 0.25, 1.0, 0, 1.0, 1.0, 1.0, 0.0]


SHAPES = {
    (128, 64): True,
    (256, 127): True,
    (257, 129): True,
    (3, 1): True,
    (515, 257): True,
    (2560, 1268): True,
    (128, 128): False,
    (64, 256): False,
    (128, 256): False,
    (256, 124): False,
}


@pytest.mark.parametrize("size", SHAPES)
def test_what_has_the_shape_of_256_by_128(size):
    assert same_shape(size, (256, 128)) == same_shape((256, 128), size) == SHAPES[size]


def test_what_lies_on_a_picture_is_cropped_where_it_is():
    picture = View(64, 64, (0.25, 0.5)).box(200, 100)
    assert picture == (25, 0, 125, 100)
    assert View(64, 64, (0.25, 0.5), on=(200, 100)).box(100, 50) == (12.5, 0, 62.5, 50)
    # Stretched over it, even in a shape of its own.
    assert View(64, 64, (0.25, 0.5), on=(200, 100)).box(40, 40) == (5, 0, 25, 40)


@pytest.mark.parametrize(("size", "place"), [((200, 100), (0, 16, 64, 32)), ((10, 40), (24, 0, 16, 64))])
def test_a_picture_that_is_to_stay_whole_lies_in_the_middle(size, place):
    assert View(64, 64, "pad").box(*size) == (0, 0, *size) and View(64, 64, "pad").place(*size) == place
    assert View(64, 64).place(*size) == (0, 0, 64, 64)


def test_a_view_without_a_crop_takes_all_of_the_picture():
    assert View(64, 48, "none").box(100, 30) == (0, 0, 100, 30)
