"""Sizes and boxes against numbers worked out by hand, and against what must hold for any."""

import random

import pytest

from utils.media.geometry import cover_box, round_to_multiple


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
