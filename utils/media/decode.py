"""Media files to tensors, and back.

Shapes: B batch, C channels (RGB), F frames, H height, W width. Pixels are float32 in [-1, 1]; a still image
has F=1.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import ExifTags, Image, ImageOps

from utils.media.geometry import cover_box

IMAGE_SUFFIXES = frozenset({".avif", ".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
CLIP_SUFFIXES = frozenset({".avi", ".gif", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm"})

SIDEWAYS = (5, 6, 7, 8)
WHITE = (255, 255, 255, 255)


class MediaError(ValueError):
    """A file that cannot be used, and why."""


@dataclass(frozen=True)
class Probe:
    """Size of a file's pictures as they are to be looked at, in pixels, and their number."""

    width: int
    height: int
    frames: int


def probe(path: Path) -> Probe:
    """What is in the file at `path`, by its header alone.

    Raises:
        MediaError: the header cannot be read.
    """
    with _open(path) as image:
        # Pillow gives the size of a TIFF upright already. A PNG's own `getexif` would decode the whole
        # picture to find EXIF behind the pixels, where next to no program writes it.
        upright = image.format == "TIFF"
        orientation = 1 if upright else Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
        width, height = image.size
    return Probe(height, width, 1) if orientation in SIDEWAYS else Probe(width, height, 1)


def load_image(path: Path, width: int, height: int) -> torch.Tensor:
    """The picture at `path` as `pixels_CFHW`, float32 in [-1, 1], F=1: scaled to cover width x height,
    cropped to it.

    What is transparent becomes white. EXIF orientation is applied.

    Raises:
        MediaError: the file cannot be decoded.
    """
    with _open(path) as image:
        image = _as_rgb(ImageOps.exif_transpose(image))
        box = cover_box(*image.size, width, height)
        image = image.resize((width, height), Image.Resampling.LANCZOS, box=box)
    pixels_HWC = torch.from_numpy(np.array(image))
    return rearrange(pixels_HWC, "h w c -> c 1 h w").float().div_(127.5).sub_(1)


def tensor_to_image(pixels_CFHW: torch.Tensor) -> Image.Image:
    """The first frame of pixels in [-1, 1] as an RGB picture; values outside are clipped."""
    levels_CHW = pixels_CFHW[:, 0].detach().float().clamp(-1, 1).add(1).mul(127.5).round().byte()
    return Image.fromarray(rearrange(levels_CHW, "c h w -> h w c").cpu().numpy())


@contextmanager
def _open(path: Path) -> Iterator[Image.Image]:
    try:
        with Image.open(path) as image:
            yield image
    except FileNotFoundError:
        raise MediaError(f"{path}: there is no such file") from None
    # Pillow's decoders answer broken bytes with OSError, SyntaxError, ValueError, struct.error, EOFError and
    # more.
    except Exception as error:
        reason = "not an image" if isinstance(error, Image.UnidentifiedImageError) else f"{error}".rstrip(".")
        raise MediaError(f"{path}: cannot be read ({reason or type(error).__name__})") from error


def _as_rgb(image: Image.Image) -> Image.Image:
    """`image`, of any mode, as RGB on white."""
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range")
    if image.mode == "I" or image.mode.startswith("I;16"):
        # Pillow's own conversion clips 16-bit grey to 255 instead of scaling it.
        levels_HW = np.asarray(image).clip(0, 65535) / 257
        image = Image.fromarray(levels_HW.round().astype(np.uint8))
    if image.has_transparency_data:
        canvas = Image.new("RGBA", image.size, WHITE)
        image = Image.alpha_composite(canvas, image.convert("RGBA"))
    return image.convert("RGB")
