"""PNGs whose texts Pillow refuses: it reads all of them together with the picture, up to a limit."""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from typing import BinaryIO

SIGNATURE = b"\x89PNG\r\n\x1a\n"
# Texts, among them the workflows of programs that draw pictures, and profiles of colour.
# XMP may say how the picture is turned.
XMP = b"XML:com.adobe.xmp\0\0"
XMP_BYTES = 2**16
LEFT_OUT = frozenset({b"tEXt", b"zTXt", b"iTXt", b"iCCP"})


def without_texts(stream: BinaryIO) -> BinaryIO | None:
    """The PNG in `stream` without its texts and its profile; None if it is no PNG."""
    stream.seek(0)
    if stream.read(len(SIGNATURE)) != SIGNATURE:
        return None
    return io.BytesIO(SIGNATURE + b"".join(_needed_chunks(stream)))


def _needed_chunks(stream: BinaryIO) -> Iterator[bytes]:
    """Length, kind, content and checksum of each chunk; the last may be cut off."""
    while len(head := stream.read(8)) == 8:
        length, kind = struct.unpack(">I4s", head)
        start = stream.read(min(len(XMP), length))
        if kind not in LEFT_OUT or (start == XMP and length <= XMP_BYTES):
            yield head + start + stream.read(length - len(start) + 4)
        else:
            stream.seek(length - len(start) + 4, io.SEEK_CUR)
