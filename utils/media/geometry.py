"""How a picture of any size comes to the size of a bucket. Pure functions; sizes in pixels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from utils.media.colour import Jitter

CENTER = (0.5, 0.5)


@dataclass(frozen=True)
class View:
    """What is seen of a picture: `width` x `height` pixels of it.

    The picture is scaled to cover them and cropped, in the centre or at a place (x, y): the parts, in [0, 1], of what
    is cut off that is cut off left and above. With the crop "none" it is scaled to them, whatever its proportions.
    Then it is mirrored, left to right, if `flip` is set, and its colours are changed.
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
        """Numbers and strings that are the same for views of the same pixels, and for no others."""
        position = [self.crop] if isinstance(self.crop, str) else [float(part) for part in self.crop]
        # One by one: `astuple` would be most of the time that naming a sample takes.
        factors = self.jitter.brightness, self.jitter.contrast, self.jitter.saturation, self.jitter.hue
        return [self.width, self.height, *position, int(self.flip), *map(float, factors)]

    def box(self, width: int, height: int) -> tuple[float, float, float, float]:
        """The part of a width x height picture to scale to the view: (left, top, right, bottom)."""
        if self.crop == "none":
            return 0, 0, width, height
        return cover_box(width, height, self.width, self.height, CENTER if self.crop == "center" else self.crop)


def round_to_multiple(value: float, multiple: int) -> int:
    """The multiple of `multiple` nearest to `value`, and at least one."""
    return max(multiple, round(value / multiple) * multiple)


def cover_box(
    width: int, height: int, target_width: int, target_height: int, position: tuple[float, float] = CENTER
) -> tuple[float, float, float, float]:
    """The part of a width x height picture to keep: (left, top, right, bottom).

    It is the largest box of the target's shape, with the parts `position` (x, y) of what remains to its left and above
    it. Resizing it to the target is the same as scaling the picture until it covers the target and cropping it,
    without rounding in between.
    """
    scale = max(target_width / width, target_height / height)
    # A division may land a hair outside the picture, which Pillow refuses.
    box_width, box_height = min(width, target_width / scale), min(height, target_height / scale)
    left, top = (width - box_width) * position[0], (height - box_height) * position[1]
    return left, top, min(width, left + box_width), min(height, top + box_height)
