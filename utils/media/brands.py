"""Brands of ISO media files: pictures and videos come in the same kind of container, and the brand says which it is."""

from __future__ import annotations

import struct
from typing import BinaryIO

# Registered brands of pictures and picture sequences: HEVC, AV1, AVC, JPEG, JPEG 2000, VVC and EVC in HEIF (ISO/IEC
# 23008-12), uncompressed ones (ISO/IEC 23001-17), and Canon's raw files.
IMAGE_BRANDS = frozenset(
    "heic heix heim heis hevc hevx hevm hevs mif1 mif2 mif3 msf1 miaf avif avis avio avci avcs jpeg jpgs j2ki j2is vvic"
    " vvis evbi evbs unif".split()
) | {"crx "}

AVIF_BRANDS = frozenset({"avif", "avis", "avio"})


def image_brand(stream: BinaryIO) -> str | None:
    """The main brand of a file that calls itself a picture; None for all other files."""
    stream.seek(0)
    size, kind, brand = struct.unpack(">I4s4s", stream.read(12).ljust(12, b"\0"))
    name = brand.decode("latin-1")
    return name if kind == b"ftyp" and size >= 12 and name in IMAGE_BRANDS else None
