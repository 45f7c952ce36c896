"""Pictures and animated pictures, by Pillow.

Shapes: H height, W width.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import count
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageOps, TiffImagePlugin

from utils.media.brands import AVIF_BRANDS, image_brand
from utils.media.colour_profiles import colours_of, in_srgb
from utils.media.png_texts import without_texts
from utils.media.source import MAX_PIXELS, MediaError, Probe, check_pixels

FORMATS = ("AVIF", "BMP", "DIB", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TGA", "TIFF", "WEBP")
"""What is opened, whatever a file is called. Pillow knows others, of which some start a program (PostScript)."""
# Other formats with several pictures hold pages, sizes or views.
ANIMATED = frozenset({"AVIF", "GIF", "PNG", "WEBP"})
UNTIMED_MILLISECONDS = 100
SIDEWAYS = (5, 6, 7, 8)
BYTES_A_PIXEL = 17
"""With all copies that are made of a picture, at most; measured."""
WHITE = (255, 255, 255, 255)
BLACK = (0, 0, 0, 255)
# Formats that store levels as they are. The others may turn 0 into 1.
LOSSLESS = frozenset({"BMP", "GIF", "PNG", "TGA", "TIFF"})
# Possible values of white in pictures with more than 8 bits, and in masks.
INTEGER_WHITES = (65535,)
MASK_WHITES = (1, 255, 65535)
# White and black of a TIFF by its own fields, kept where Pillow keeps what it knows of a picture.
DEEP_RANGE = "white and black of more than 8 bits"
DEEP_MODES = ("F", "I")
SIGNED = 2
WHITE_IS_ZERO = 0
FLOAT_WHITES = (1, 255, 65535)


class TimedFrame(NamedTuple):
    """A frame: its end in seconds from the beginning of the file, and a function that gives it upright, which must be
    called before the next frame is requested. `is_exact` if it is a still picture whose levels were stored as they
    are."""

    end: float
    picture: Callable[[], Image.Image]
    is_exact: bool = False


def open_image(stream: BinaryIO) -> Image.Image | None:
    """The undecoded picture in `stream`; None if it is no picture, or one of a format that nothing here decodes.

    Raises:
        MediaError: it has too many pixels, or it is a HEIF that cannot be read.
    """
    try:
        image = Image.open(stream, formats=FORMATS)
    except Image.UnidentifiedImageError:
        brand = image_brand(stream)
        # FFmpeg would take the first of the tiles or thumbnails of such a file for the picture.
        image = _open_heif(stream, brand) if brand else None
    except ValueError:
        # Of a PNG this is Pillow's limit for texts, which are no part of the picture.
        image = _open_without_texts(stream)
        if image is None:
            raise
    except Image.DecompressionBombError as error:
        reason = str(error).rstrip(".")
        raise MediaError(f"more than {MAX_PIXELS:,} pixels ({reason}); scale it down or remove it") from error
    if image is None:
        return None
    check_pixels(*image.size)
    if image.format == "TIFF":
        image.info[DEEP_RANGE] = _deep_range(image)
    return image


def _open_without_texts(stream: BinaryIO) -> Image.Image | None:
    """A PNG without its texts, and without its profile if that is too large for Pillow too; None if it is no PNG."""
    for profile in (True, False):
        lean = without_texts(stream, profile=profile)
        if lean is None:
            return None
        with suppress(ValueError):
            return Image.open(lean, formats=FORMATS)
    return None


def _deep_range(image: Image.Image) -> tuple[int, int]:
    """White and black of a TIFF whose pixels are integers of 9 to 16 bits; Pillow gives them as they are stored."""
    fields = TiffImagePlugin
    (bits, *_), (kind, *_) = (image.tag_v2.get(field, (1,)) for field in (fields.BITSPERSAMPLE, fields.SAMPLEFORMAT))
    white = 2 ** (min(bits, 16) - (kind == SIGNED)) - 1
    # Of 8 bits Pillow turns such pictures round itself.
    return (0, white) if image.tag_v2.get(fields.PHOTOMETRIC_INTERPRETATION) == WHITE_IS_ZERO else (white, 0)


def _open_heif(stream: BinaryIO, brand: str) -> Image.Image:
    """The main picture of a HEIF, upright and whole, whatever tiles it is stored in."""
    if brand in AVIF_BRANDS:
        raise MediaError("is an AVIF picture that is broken; replace or remove it")
    try:
        from pillow_heif import HeifImageFile
    except ImportError as error:
        what = f"is a HEIF picture, read by pillow-heif, which cannot be imported ({error}); `pip install pillow-heif`"
        raise MediaError(what) from error
    try:
        # Not registered with Pillow, since that would change what other code in this process opens.
        return HeifImageFile(stream)
    except Exception as error:
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise MediaError(
            f"is a HEIF picture of the kind {brand!r} that cannot be read ({reason}); save it as PNG or JPEG"
        ) from error


def probe_image(image: Image.Image) -> Probe:
    """Examines a picture: only the header of a still is read; an animation is decoded to find its durations. One
    that is broken behind its first frame is a still picture with a fault."""
    # Pillow gives the size of a TIFF upright already. A PNG's own `getexif` would decode the whole picture to find
    # EXIF behind the pixels, where hardly any program writes it.
    upright = image.format == "TIFF"
    orientation = 1 if upright else Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
    width, height = reversed(image.size) if orientation in SIDEWAYS else image.size
    still = Probe(width, height, 1, colours=colours_of(image))
    if not animated(image):
        return still
    ends: list[float] = []
    try:
        ends.extend(frame.end for frame in shown_images(image))
    # Decoders react to broken bytes with OSError, SyntaxError, ValueError, struct.error, EOFError and more.
    except Exception as error:
        if not ends:
            raise
        fault = f"is broken behind frame {len(ends)} ({str(error).rstrip('.')})"
        return replace(still, fault=fault)
    return replace(still, frames=len(ends), fps=len(ends) / ends[-1])


def shown_images(image: Image.Image) -> Iterator[TimedFrame]:
    """The frames of an animation in order; a still picture lasts for ever."""
    if not animated(image):
        yield TimedFrame(math.inf, lambda: _upright(image), image.format in LOSSLESS)
        return
    milliseconds = 0.0
    # An animated PNG may begin with a picture for programs that only show stills.
    for frame in count(1 if getattr(image, "default_image", False) else 0):
        # Not counted before: that would read all of a GIF, and fail where a later frame is broken.
        try:
            image.seek(frame)
        except EOFError:
            return
        # In some formats a frame's duration is known only after decoding.
        image.load()
        # Without a duration, browsers show a frame for a tenth of a second.
        milliseconds += image.info.get("duration") or UNTIMED_MILLISECONDS
        yield TimedFrame(milliseconds / 1000, lambda: ImageOps.exif_transpose(image))


def _upright(image: Image.Image) -> Image.Image:
    try:
        image.load()
    except (OSError, ValueError, SyntaxError):
        # Pillow has no tile left to decode: what is broken, or longer than it reads, stands behind the pixels.
        if image.format != "PNG" or image.tile:
            raise
    # Another copy of a large picture is much memory.
    ImageOps.exif_transpose(image, in_place=True)
    return image


def decoded_bytes(image: Image.Image) -> int:
    """The memory that a picture takes at most while it is decoded and brought to RGB or RGBA."""
    return image.width * image.height * BYTES_A_PIXEL


def rgb_of(image: Image.Image) -> Image.Image:
    """`image`, of any mode, as RGB on white, in the colours of sRGB; `image` itself may be changed to them."""
    return _rgb_on(in_srgb(_of_8_bits(image, INTEGER_WHITES)), WHITE)


def mask_of(image: Image.Image) -> Image.Image:
    """The mask that `image`, of any mode, shows, as 8-bit grey; transparent pixels are black. White of more than 8 bits
    is the first of `MASK_WHITES` that no pixel exceeds. Its levels are numbers, whatever colours a profile makes of
    them."""
    return _rgb_on(_of_8_bits(image, MASK_WHITES), BLACK).convert("L")


def exact_mask_of(image: Image.Image) -> Image.Image:
    """`mask_of` a picture whose levels were stored as they are: if none exceeds 1, then 1 is white."""
    mask = mask_of(image)
    return mask.point(lambda level: 255 * level) if mask.getextrema()[1] == 1 else mask


def _rgb_on(image: Image.Image, ground: tuple[int, ...]) -> Image.Image:
    if image.has_transparency_data:
        canvas = Image.new("RGBA", image.size, ground)
        image = Image.alpha_composite(canvas, image.convert("RGBA"))
    return image if image.mode == "RGB" else image.convert("RGB")


def alpha_of(image: Image.Image) -> Image.Image:
    """The opacity of `image` as 8-bit grey: white where it is not transparent."""
    if not image.has_transparency_data:
        return Image.new("L", image.size, 255)
    return image.convert("RGBA").getchannel("A")


def rgba_of(image: Image.Image) -> Image.Image:
    """`image`, of any mode, as RGBA in the colours of sRGB, to which `image` itself may be changed; invisible pixels
    are black, as scaling makes them, whatever the file holds there."""
    image = in_srgb(_of_8_bits(image, INTEGER_WHITES))
    image = image.convert("RGBA") if image.has_transparency_data else _rgb_on(image, WHITE).convert("RGBA")
    canvas = Image.new("RGBA", image.size)
    canvas.paste(image, mask=image.getchannel("A").point(lambda level: 255 if level else 0))
    return canvas


def animated(image: Image.Image) -> bool:
    """Whether the picture has several frames."""
    if image.format not in ANIMATED:
        return False
    try:
        return getattr(image, "is_animated", False)
    except (OSError, ValueError, SyntaxError, IndexError, struct.error):
        # A GIF looks for its second frame, which is there, and broken.
        return True


def _of_8_bits(image: Image.Image, integer_whites: Sequence[int]) -> Image.Image:
    """Grey of 16 or 32 bits, or of floating-point numbers, as 8-bit grey; other pictures as they are.

    Pillow's own conversion clips at 255. White is the first of `integer_whites` that no pixel exceeds, none of them
    above that of the picture's own depth; for floating-point numbers it is the first of `FLOAT_WHITES`. Values beyond
    all of these are scaled by their own range.
    """
    if image.mode not in DEEP_MODES and not image.mode.startswith("I;16"):
        return image
    values_HW = np.asarray(image, dtype=np.float32)
    low, high = float(values_HW.min()), float(values_HW.max())
    if not math.isfinite(low) or not math.isfinite(high):
        raise MediaError("has pixels that are infinite or no numbers; write it anew without them")
    deepest, darkest = image.info.get(DEEP_RANGE, (INTEGER_WHITES[-1], 0))
    own = max(deepest, darkest)
    whites = FLOAT_WHITES if image.mode == "F" else [min(white, own) for white in integer_whites]
    fitting = [white for white in whites if low >= 0 and high <= white]
    black, white = (0, fitting[0]) if fitting else (low, high)
    levels_HW = (values_HW - black) * (255 / (white - black or 1))
    levels_HW = 255 - levels_HW if deepest < darkest and image.mode != "F" else levels_HW
    shallow = Image.fromarray(levels_HW.round().astype(np.uint8))
    if profile := image.info.get("icc_profile"):
        shallow.info["icc_profile"] = profile
    return shallow
