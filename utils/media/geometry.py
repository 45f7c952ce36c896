"""How a picture of any size comes to the size of a bucket. Pure functions; sizes in pixels."""

from __future__ import annotations


def round_to_multiple(value: float, multiple: int) -> int:
    """The multiple of `multiple` nearest to `value`, and at least one."""
    return max(multiple, round(value / multiple) * multiple)


def cover_box(width: int, height: int, target_width: int, target_height: int) -> tuple[float, float, float, float]:
    """The part of a width x height picture to keep: (left, top, right, bottom).

    It is the largest centred box of the target's shape. Resizing it to the target is the same as scaling the
    picture until it covers the target and cropping the centre, without rounding in between.
    """
    scale = max(target_width / width, target_height / height)
    # A division may land a hair outside the picture, which Pillow refuses.
    box_width, box_height = min(width, target_width / scale), min(height, target_height / scale)
    left, top = (width - box_width) / 2, (height - box_height) / 2
    return left, top, left + box_width, top + box_height
