"""Media files to tensors.

The bytes of a file say what it is; its suffix only decides whether it is looked at. Calls share nothing, so they may
run in threads.

Shapes: C channels (RGB), F frames, H height, W width. Pixels are float32 in [-1, 1], masks in [0, 1]; a still image
has F=1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from types import ModuleType
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from einops import rearrange
from PIL import Image

from utils.media.colour import jittered
from utils.media.geometry import View
from utils.media.images import (
    TimedFrame,
    alpha_of,
    animated,
    decoded_bytes,
    exact_mask_of,
    mask_of,
    open_image,
    probe_image,
    rgb_of,
    rgba_of,
    shown_images,
)
from utils.media.memory import Room
from utils.media.source import ROUNDING_SECONDS, MediaError, Probe, Source, opened

IMAGE_SUFFIXES = frozenset(".avif .bmp .heic .heif .hif .jfif .jp2 .jpeg .jpg .png .tga .tif .tiff .webp".split())
CLIP_SUFFIXES = frozenset(
    {".apng", ".avi", ".flv", ".gif", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ts", ".webm", ".wmv"}
)


ROOM = Room()
"""Of this process."""


class _Channels(NamedTuple):
    """Which channels of a picture are read (one, three or four), the filter that scales them, what is around a
    picture that does not fill its view, and how a picture is read whose levels were stored as they are."""

    of: Callable[[Image.Image], Image.Image]
    filter: Image.Resampling
    around: int | tuple[int, ...]
    of_exact: Callable[[Image.Image], Image.Image] | None = None


COLOUR = _Channels(rgb_of, Image.Resampling.LANCZOS, (255, 255, 255))
# Lanczos would put a brighter and a darker line along the edges of a mask.
LUMINANCE = _Channels(mask_of, Image.Resampling.BILINEAR, 0, exact_mask_of)
ALPHA = _Channels(alpha_of, Image.Resampling.BILINEAR, 0)
# Pillow weighs colours by their opacity when it scales.
TRANSLUCENT = _Channels(rgba_of, Image.Resampling.LANCZOS, (0, 0, 0, 0))


def probe(source: Source) -> Probe:
    """Examines a file. For a still picture only the header is read; animations and videos are read completely.

    Raises:
        MediaError: it contains nothing that can be decoded, or too many pixels.
    """
    with opened(source) as stream:
        image = open_image(stream)
        if not image:
            return _video().probe_video(stream)
        with ROOM.taken(decoded_bytes(image) if animated(image) else 0):
            return probe_image(image)


def load_image(source: Source, view: View) -> torch.Tensor:
    """The picture, or the first frame of a clip, as `pixels_CFHW`, float32 in [-1, 1], F=1.

    Transparent pixels become white. EXIF orientation is applied.

    Raises:
        MediaError: the file cannot be decoded.
    """
    return load_clip(source, view, 0.0, 1, 1.0)


def load_rgba(source: Source, view: View) -> torch.Tensor:
    """The picture, or the first frame of a clip, as `pixels_CFHW`, float32 in [-1, 1], C=4, F=1: its colours and its
    opacity, where 1 is opaque. Invisible pixels are black before the colours change as `view` says.

    Raises:
        MediaError: the file cannot be decoded.
    """
    pixels_CFHW = _tensor(_levels(source, view, 0.0, 1, 1.0, TRANSLUCENT), view).div_(127.5).sub_(1)
    return torch.cat([jittered(pixels_CFHW[:3], view.jitter), pixels_CFHW[3:]])


def load_clip(source: Source, view: View, start_seconds: float, frames: int, fps: float) -> torch.Tensor:
    """A clip as `pixels_CFHW`, float32 in [-1, 1], F=frames: frame i is the one that the file shows
    `start_seconds` + i / `fps` after its beginning. A still picture lasts for ever.

    Each frame is scaled as soon as it is decoded; frames behind the clip are not decoded.

    Raises:
        MediaError: the file cannot be decoded, or is too short.
    """
    levels_FHWC = _levels(source, view, start_seconds, frames, fps, COLOUR)
    pixels_CFHW = _tensor(levels_FHWC, view).div_(127.5).sub_(1)
    return jittered(pixels_CFHW, view.jitter)


def load_mask(
    source: Source, view: View, start_seconds: float = 0.0, frames: int = 1, fps: float = 1.0
) -> torch.Tensor:
    """The mask that a picture or clip shows as `mask_1FHW`, float32 in [0, 1]: its luminance, and 0 where it is
    transparent. In a still picture whose levels are all 0 and 1, 1 is white. Otherwise like `load_clip`, in the colours
    of the file."""
    return _tensor(_levels(source, view, start_seconds, frames, fps, LUMINANCE), view).div_(255)


def load_alpha(
    source: Source, view: View, start_seconds: float = 0.0, frames: int = 1, fps: float = 1.0
) -> torch.Tensor:
    """The opacity of a picture or clip as `mask_1FHW`, float32 in [0, 1]; 1 if it has no transparency."""
    return _tensor(_levels(source, view, start_seconds, frames, fps, ALPHA), view).div_(255)


def decode_all(source: Source, *, first_alone: bool = False) -> None:
    """Decodes all frames of a file, or the first alone, and keeps nothing.

    Raises:
        MediaError: one of them cannot be decoded.
    """
    with opened(source) as stream, closing(_shown(stream, 0.0)) as timed_frames:
        for _, picture, _ in timed_frames:
            picture()
            if first_alone:
                return


def _levels(
    source: Source, view: View, start_seconds: float, frames: int, fps: float, channels: _Channels
) -> np.ndarray:
    """The scaled frames of a clip, not yet mirrored, as `levels_FHWC`, uint8."""
    assert start_seconds >= 0 and frames > 0 and fps > 0, (start_seconds, frames, fps)
    levels: list[np.ndarray] = []
    with opened(source) as stream, closing(_shown(stream, start_seconds)) as timed_frames:
        end = 0.0
        for end, picture, is_exact in timed_frames:
            fitted, read = None, channels.of_exact if is_exact and channels.of_exact else channels.of
            # A frame is used several times or never if the file has another frame rate.
            while len(levels) < frames and start_seconds + len(levels) / fps < end - ROUNDING_SECONDS:
                fitted = _fit(read(picture()), view, channels) if fitted is None else fitted
                levels.append(fitted)
            if len(levels) == frames:
                return np.stack(levels)
        wanted = f"wanted are {frames} frames, {fps:g} per second, from {start_seconds:.3f} s on"
        raise MediaError(f"ends after {end:.3f} s, but {wanted}; use a shorter clip, or replace the file")


def _shown(stream: BinaryIO, start_seconds: float) -> Iterator[TimedFrame]:
    image = open_image(stream)
    if not image:
        yield from _video().shown_frames(stream, start_seconds)
        return
    with ROOM.taken(decoded_bytes(image)):
        yield from shown_images(image)


def _video() -> ModuleType:
    """What decodes videos; pictures can do without PyAV.

    Raises:
        MediaError: PyAV is not installed.
    """
    try:
        from utils.media import video
    except ImportError as error:
        raise MediaError(f"is read by PyAV, which cannot be imported ({error}); `pip install av`") from error
    return video


def _fit(image: Image.Image, view: View, channels: _Channels) -> np.ndarray:
    left, top, width, height = view.place(*image.size)
    fitted = image.resize((width, height), channels.filter, box=view.box(*image.size))
    if (width, height) != (view.width, view.height):
        whole = Image.new(fitted.mode, (view.width, view.height), channels.around)
        whole.paste(fitted, (left, top))
        fitted = whole
    return np.asarray(fitted).reshape(view.height, view.width, -1)


def _tensor(levels_FHWC: np.ndarray, view: View) -> torch.Tensor:
    """Levels as float32 in their own range, mirrored if the view is mirrored."""
    levels_CFHW = rearrange(torch.from_numpy(levels_FHWC), "f h w c -> c f h w")
    mirrored = levels_CFHW.flip(-1) if view.flip else levels_CFHW
    return mirrored.to(torch.float32, memory_format=torch.contiguous_format)
