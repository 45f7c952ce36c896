"""Where media come from, what is known of them unseen, and what is said of those that cannot be used."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

MAX_PIXELS = 178_956_970
"""Pixels of a picture or frame, beyond which a file is refused unread: Pillow refuses more of its own accord."""

ROUNDING_SECONDS = 0.001
"""A frame counts as shown from so much before its time: Matroska rounds times to milliseconds."""


class MediaError(ValueError):
    """A file that cannot be used: its name, why, and what to do about it."""


@dataclass(frozen=True)
class Blob:
    """A file that lies in another one, such as a member of a tar archive or a cell of a Parquet file.

    `name` is for messages. `open` gives, at every call, another seekable stream at its beginning, so that threads
    may read the same blob at once.
    """

    name: str
    open: Callable[[], BinaryIO]


Source = Path | Blob


@dataclass(frozen=True)
class Probe:
    """Size of a file's pictures as they are to be looked at, in pixels, their number, and how many come in a second on
    average; a still has one frame and the rate 0."""

    width: int
    height: int
    frames: int
    fps: float = 0.0

    @property
    def seconds(self) -> float:
        return self.frames / self.fps if self.fps else 0.0


@contextmanager
def opened(source: Source) -> Iterator[BinaryIO]:
    """The bytes of `source`, while whatever goes wrong becomes a MediaError that begins with its name."""
    try:
        with source.open("rb") if isinstance(source, Path) else source.open() as stream:
            if not stream.read(1):
                raise MediaError("the file is empty; replace or remove it")
            stream.seek(0)
            yield stream
    # Decoders answer broken bytes with OSError, SyntaxError, ValueError, struct.error, EOFError and more.
    except Exception as error:
        name = source.name if isinstance(source, Blob) else source
        raise MediaError(f"{name}: {_reason(error)}") from error


def check_pixels(width: int, height: int) -> None:
    """Refuses, in time, what would not fit into memory once decoded."""
    if width * height > MAX_PIXELS:
        raise MediaError(f"{width}x{height} are more than {MAX_PIXELS:,} pixels; scale it down or remove it")


def _reason(error: Exception) -> str:
    if isinstance(error, MediaError):
        return str(error)
    if isinstance(error, FileNotFoundError):
        return "there is no such file"
    # The text of an error of FFmpeg has its number and the file's name around the words.
    words = getattr(error, "strerror", None) or str(error).rstrip(".") or type(error).__name__
    return f"cannot be read ({words}); replace or remove it"
