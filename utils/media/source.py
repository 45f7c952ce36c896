"""Sources of media, what is known before decoding, and the errors of files that cannot be used."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from utils.errors import printable
from utils.media.colour_profiles import Colours

MAX_PIXELS = 178_956_970
"""The largest number of pixels of a picture or frame; Pillow refuses more on its own."""

ROUNDING_SECONDS = 0.001
"""A frame counts as visible this many seconds before its time, since Matroska rounds times to milliseconds."""


class MediaError(ValueError):
    """A file that cannot be used: its name, the reason, and what to do about it."""


@dataclass(frozen=True)
class Blob:
    """A file inside another one, such as a member of a tar archive or a cell of a Parquet file.

    `name` is for messages. Every call of `open` gives a new seekable stream at its beginning, so that threads may read
    the same blob at once.
    """

    name: str
    open: Callable[[], BinaryIO]


Source = Path | Blob


@dataclass(frozen=True)
class Probe:
    """The upright size of a file's frames in pixels, their number, and their average number per second; a still picture
    has one frame and 0 fps. `fault` says what of the file cannot be read, where its first frame can; `colours`, what is
    done about the profile of a picture."""

    width: int
    height: int
    frames: int
    fps: float = 0.0
    fault: str = ""
    colours: Colours = ""

    @property
    def seconds(self) -> float:
        return self.frames / self.fps if self.fps else 0.0


@contextmanager
def opened(source: Source) -> Iterator[BinaryIO]:
    """The bytes of `source`; any error within this context becomes a MediaError that begins with its name."""
    try:
        with source.open("rb") if isinstance(source, Path) else source.open() as stream:
            if not stream.read(1):
                raise MediaError("the file is empty; replace or remove it")
            stream.seek(0)
            yield stream
    # Decoders react to broken bytes with OSError, SyntaxError, ValueError, struct.error, EOFError and more.
    except Exception as error:
        name = source.name if isinstance(source, Blob) else source
        raise MediaError(f"{printable(name)}: {printable(_reason(error))}") from error


def check_pixels(width: int, height: int) -> None:
    """Refuses pictures that would not fit into memory, before they are decoded."""
    if width * height > MAX_PIXELS:
        raise MediaError(f"{width}x{height} are more than {MAX_PIXELS:,} pixels; scale it down or remove it")


def _reason(error: Exception) -> str:
    if isinstance(error, MediaError):
        return str(error)
    if isinstance(error, FileNotFoundError):
        return "there is no such file"
    # The text of FFmpeg's errors also contains the error number and the file's name.
    words = getattr(error, "strerror", None) or str(error).rstrip(".") or type(error).__name__
    return f"cannot be read ({words}); replace or remove it"
