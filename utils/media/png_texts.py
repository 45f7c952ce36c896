"""PNGs whose texts Pillow refuses: it reads all of them together with the picture, up to a limit."""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator, Set
from typing import BinaryIO

SIGNATURE = b"\x89PNG\r\n\x1a\n"
# XMP may say how the picture is turned.
XMP = b"XML:com.adobe.xmp\0\0"
XMP_BYTES = 2**16
TEXTS = frozenset({b"tEXt", b"zTXt", b"iTXt"})
"""Among them are the workflows of programs that draw pictures."""
PROFILE = b"iCCP"


def without_texts(stream: BinaryIO, *, profile: bool = True) -> BinaryIO | None:
    """The PNG in `stream` without its texts, with or without its profile of colour; None if it is no PNG."""
    stream.seek(0)
    if stream.read(len(SIGNATURE)) != SIGNATURE:
        return None
    return io.BytesIO(SIGNATURE + b"".join(_other_chunks(stream, TEXTS if profile else {*TEXTS, PROFILE})))


def _other_chunks(stream: BinaryIO, left_out: Set[bytes]) -> Iterator[bytes]:
    """Length, kind, content and checksum of each chunk of another kind; the last may be cut off."""
    while len(head := stream.read(8)) == 8:
        length, kind = struct.unpack(">I4s", head)
        start = stream.read(min(len(XMP), length))
        if kind not in left_out or (start == XMP and length <= XMP_BYTES):
            yield head + start + stream.read(length - len(start) + 4)
        else:
            stream.seek(length - len(start) + 4, io.SEEK_CUR)
