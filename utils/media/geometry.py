"""Scales and crops pictures of any size to the size of a bucket. Pure functions; sizes in pixels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from utils.media.colour import Jitter

CENTER = (0.5, 0.5)


@dataclass(frozen=True)
class View:
    """The part of a picture that is used, as `width` x `height` pixels.

    The picture is scaled to cover this size and cropped in the centre or at a position (x, y): the fractions, in
    [0, 1], of the excess that are cut off on the left and at the top. With the crop "none" it is scaled to this size
    regardless of its proportions. Then it is mirrored left to right if `flip` is set, and its colours are changed.
    """

    width: int
    height: int
    crop: Literal["center", "none"] | tuple[float, float] = "center"
    flip: bool = False
    jitter: Jitter = Jitter()

    def __post_init__(self) -> None:
        assert self.width > 0 and self.height > 0, self
        assert self.crop in ("center", "none") or all(0 <= part <= 1 for part in self.crop), self

    @property
    def identity(self) -> list[str | float]:
        """Numbers and strings that are equal if and only if two views give the same pixels."""
        position = [self.crop] if isinstance(self.crop, str) else [float(part) for part in self.crop]
        # Field by field: `astuple` would take most of the time of computing a key.
        factors = self.jitter.brightness, self.jitter.contrast, self.jitter.saturation, self.jitter.hue
        return [self.width, self.height, *position, int(self.flip), *map(float, factors)]

    def box(self, width: int, height: int) -> tuple[float, float, float, float]:
        """The box of a width x height picture that is scaled to the view: (left, top, right, bottom)."""
        if self.crop == "none":
            return 0, 0, width, height
        return cover_box(width, height, self.width, self.height, CENTER if self.crop == "center" else self.crop)


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
