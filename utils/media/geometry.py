"""Scales and crops pictures of any size to the size of a bucket. Pure functions; sizes in pixels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from utils.media.colour import Jitter

CENTER = (0.5, 0.5)
Size = tuple[int, int]

SHAPE_TOLERANCE = 0.01
"""How much the proportions of two pictures may differ when one is to lie on the other."""


@dataclass(frozen=True)
class View:
    """The part of a picture that is used, as `width` x `height` pixels.

    The picture is scaled to cover this size and cropped in the centre or at a position (x, y): the fractions, in
    [0, 1], of the excess that are cut off on the left and at the top. With the crop "none" it is scaled to this size
    regardless of its proportions; with "pad" it is scaled to fit into it whole, in the centre. Then it is mirrored left
    to right if `flip` is set, and its colours are changed.

    A mask or control that lies on a picture of the size `on` is cropped where that picture is cropped.
    """

    width: int
    height: int
    crop: Literal["center", "none", "pad"] | tuple[float, float] = "center"
    flip: bool = False
    jitter: Jitter = Jitter()
    on: Size | None = None

    def __post_init__(self) -> None:
        assert self.width > 0 and self.height > 0, self
        assert self.crop in ("center", "none", "pad") or all(0 <= part <= 1 for part in self.crop), self

    @property
    def identity(self) -> list[str | float]:
        """Numbers and strings that are equal if and only if two views give the same pixels."""
        position = [self.crop] if isinstance(self.crop, str) else [float(part) for part in self.crop]
        # Field by field: `astuple` would take most of the time of computing a key.
        factors = self.jitter.brightness, self.jitter.contrast, self.jitter.saturation, self.jitter.hue
        return [self.width, self.height, *position, int(self.flip), *map(float, factors), *(self.on or ())]

    def box(self, width: int, height: int) -> tuple[float, float, float, float]:
        """The box of a width x height picture that is scaled to the view: (left, top, right, bottom)."""
        if self.crop in ("none", "pad"):
            return 0, 0, width, height
        position = CENTER if self.crop == "center" else self.crop
        if self.on is None:
            return cover_box(width, height, self.width, self.height, position)
        across, down = width / self.on[0], height / self.on[1]
        left, top, right, bottom = cover_box(*self.on, self.width, self.height, position)
        return left * across, top * down, min(width, right * across), min(height, bottom * down)

    def place(self, width: int, height: int) -> tuple[int, int, int, int]:
        """Where the scaled box of a width x height picture lies in the view: (left, top, width, height)."""
        if self.crop != "pad":
            return 0, 0, self.width, self.height
        scale = min(self.width / width, self.height / height)
        inner = max(1, round(width * scale)), max(1, round(height * scale))
        return (self.width - inner[0]) // 2, (self.height - inner[1]) // 2, *inner


def same_shape(size: Size, other: Size) -> bool:
    """Whether two pictures have the same proportions, so that one can lie on the other: up to `SHAPE_TOLERANCE`, or up
    to one pixel of each side, to which the sides of a picture that was scaled down are rounded."""
    ratio = size[0] * other[1] / (size[1] * other[0])
    if max(ratio, 1 / ratio) <= 1 + SHAPE_TOLERANCE:
        return True
    return _is_rounded(size, other) or _is_rounded(other, size)


def _is_rounded(size: Size, other: Size) -> bool:
    """Whether some scale brings both sides of `other` within a pixel of those of `size`."""
    lowest = max((one - 1) / side for one, side in zip(size, other, strict=True))
    highest = min((one + 1) / side for one, side in zip(size, other, strict=True))
    return lowest <= highest


def round_to_multiple(value: float, multiple: int) -> int:
    """The multiple of `multiple` nearest to `value`, and at least one."""
    return max(multiple, round(value / multiple) * multiple)


def cover_box(
    width: int, height: int, target_width: int, target_height: int, position: tuple[float, float] = CENTER
) -> tuple[float, float, float, float]:
    """The box of a width x height picture to keep: (left, top, right, bottom).

    It is the largest box of the target's shape; the fractions `position` (x, y) of the excess lie on its left and above
    it. Scaling this box to the target equals scaling the picture until it covers the target and then cropping it,
    without rounding in between.
    """
    scale = max(target_width / width, target_height / height)
    # A division may end slightly outside the picture, which Pillow refuses.
    box_width, box_height = min(width, target_width / scale), min(height, target_height / scale)
    left, top = (width - box_width) * position[0], (height - box_height) * position[1]
    return left, top, min(width, left + box_width), min(height, top + box_height)
