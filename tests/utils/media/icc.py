"""ICC profiles (ICC.1:2001-04, version 2.4) for tests, written byte by byte."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence

D50 = (0.9642, 1.0, 0.8249)
DISPLAY_P3 = ((0.51512, 0.24120, -0.00105), (0.29198, 0.69225, 0.04189), (0.15710, 0.06657, 0.78407))
"""XYZ, under D50, of red, green and blue of Display P3."""


def of_rgb(primaries: Sequence[Sequence[float]], gamma: float) -> bytes:
    """The profile of a display with these primaries."""
    tags = {f"{name}XYZ": _xyz(value) for name, value in zip("rgb", primaries, strict=True)}
    tags |= {f"{name}TRC": _curve(gamma) for name in "rgb"}
    return _profile(b"RGB ", tags)


def of_grey(gamma: float) -> bytes:
    return _profile(b"GRAY", {"kTRC": _curve(gamma)})


def _profile(space: bytes, tags: Mapping[str, bytes]) -> bytes:
    tags = {"desc": _description(), "cprt": b"text\0\0\0\0-\0\0\0", "wtpt": _xyz(D50), **tags}
    table, contents, start = b"", b"", 128 + 4 + 12 * len(tags)
    for name, content in tags.items():
        table += name.encode() + struct.pack(">II", start + len(contents), len(content))
        contents += content + b"\0" * (-len(content) % 4)
    body = struct.pack(">I", len(tags)) + table + contents
    head = struct.pack(">I4sI4s4s4s", 128 + len(body), b"\0" * 4, 0x02400000, b"mntr", space, b"XYZ ")
    head += b"\0" * 12 + b"acsp" + b"\0" * 28 + _numbers(D50)
    return head.ljust(128, b"\0") + body


def _numbers(values: Sequence[float]) -> bytes:
    return b"".join(struct.pack(">i", round(value * 65536)) for value in values)


def _xyz(value: Sequence[float]) -> bytes:
    return b"XYZ \0\0\0\0" + _numbers(value)


def _curve(gamma: float) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256))


def _description() -> bytes:
    return b"desc\0\0\0\0" + struct.pack(">I", 2) + b"x\0" + b"\0" * 78
