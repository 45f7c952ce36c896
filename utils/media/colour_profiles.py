"""Colours of pictures that bring an ICC profile, as those of sRGB, which models learn from and draw in.

Telephones write Display P3, cameras Adobe RGB, printers some kind of CMYK: read as if they were sRGB, their colours are
too pale or of another hue.
"""

from __future__ import annotations

import io
from functools import lru_cache
from typing import Literal

import numpy as np
from PIL import Image, ImageCms

Colours = Literal["", "converted", "unknown", "wide", "inks"]
"""What is done about colours that may not be sRGB: nothing, since they are; they are converted, by the profile of a
picture; or they are taken as they are, since that profile cannot be used, or since a video has a high dynamic range or
a wide gamut, which are not converted. Of inks (CMYK) without a profile that can be used, each is taken to be the
complement of red, green or blue, which is as much as can be known of them."""

PROFILES_KEPT = 32
ALIKE = 2
"""Levels by which a profile of sRGB, of which there are many, differs from another at most."""
STEPS = 9
_MODES = {"L": "L", "LA": "L", "RGB": "RGB", "RGBA": "RGBA", "CMYK": "CMYK"}
CONVERTED_TO = {"L": "RGB", "RGB": "RGB", "RGBA": "RGBA", "CMYK": "RGB"}


def colours_of(image: Image.Image) -> Colours:
    """What `in_srgb` will do; the picture need not be decoded."""
    profile, has_inks = image.info.get("icc_profile"), image.mode == "CMYK"
    if not profile:
        return "inks" if has_inks else ""
    try:
        return "converted" if _conversion(profile, _MODES.get(_plain_mode(image), "")) else ""
    except (ImageCms.PyCMSError, OSError):
        return "inks" if has_inks else "unknown"


def in_srgb(image: Image.Image) -> Image.Image:
    """The picture, of 8 bits a channel, in the colours of sRGB; as it is if it has no profile that can be used. The
    picture itself may be changed, since another copy of a large one is much memory.

    Colours outside of sRGB become the nearest on its surface, and the darkest black stays black (relative colorimetric
    with black point compensation, ICC.1:2022).
    """
    if colours_of(image) != "converted":
        return image
    # Without its profile it is not converted once more.
    profile, mode = image.info.pop("icc_profile"), _plain_mode(image)
    image = image if image.mode == mode else image.convert(mode)
    conversion = _conversion(profile, _MODES[mode])
    if mode in CONVERTED_TO.values():
        ImageCms.applyTransform(image, conversion, inPlace=True)
        return image
    converted = ImageCms.applyTransform(image.getchannel("L") if mode == "LA" else image, conversion)
    converted.info.pop("icc_profile", None)
    if mode == "LA":
        converted.putalpha(image.getchannel("A"))
    return converted


def _plain_mode(image: Image.Image) -> str:
    """The mode in which a picture's levels are those that its profile speaks of, with its opacity as a channel."""
    mode = {"P": "RGB", "PA": "RGBA", "1": "L", "I;16": "L", "I": "L", "F": "L"}.get(image.mode, image.mode)
    return {"RGB": "RGBA", "L": "LA"}.get(mode, mode) if image.has_transparency_data else mode


@lru_cache(PROFILES_KEPT)
def _conversion(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """What converts pictures of a mode, to RGBA or RGB; None if it would change next to nothing.

    Raises:
        PyCMSError, OSError: the profile is broken, or not of such pictures.
    """
    if not mode:
        raise ImageCms.PyCMSError("no profile is of such pictures")
    conversion = ImageCms.buildTransform(
        ImageCms.ImageCmsProfile(io.BytesIO(profile)),
        ImageCms.createProfile("sRGB"),
        mode,
        CONVERTED_TO[mode],
        ImageCms.Intent.RELATIVE_COLORIMETRIC,
        ImageCms.Flags.BLACKPOINTCOMPENSATION,
    )
    if mode == "CMYK":
        return conversion
    probe = _colours_of_all_kinds().convert(mode)
    plain, found = (
        np.asarray(one.convert("RGB"), np.int16) for one in (probe, ImageCms.applyTransform(probe, conversion))
    )
    return conversion if np.abs(found - plain).max() > ALIKE else None


def _colours_of_all_kinds() -> Image.Image:
    """A picture of one line with colours from all of RGB, and all greys."""
    levels = np.linspace(0, 255, STEPS).round().astype(np.uint8)
    colours = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(-1, 3)
    greys = np.arange(256, dtype=np.uint8)[:, None].repeat(3, 1)
    return Image.fromarray(np.concatenate([colours, greys])[None])
