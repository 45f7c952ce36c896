"""Locations of the bytes of pictures and clips, and what a source lists about them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal, Protocol

from utils.errors import printable
from utils.media.source import Blob, Source

Kind = Literal[
    "broken row",
    "caption missing",
    "caption unreadable",
    "control missing",
    "mask missing",
    "name not UTF-8",
    "no picture",
    "no such file",
    "not listed",
    "not read",
    "other shape",
    "twice",
    "unknown kind of file",
    "unreadable",
]
NOT_BROKEN: frozenset[Kind] = frozenset({"no picture", "not listed", "not read", "twice", "unknown kind of file"})
"""Kinds of rejections that are reported although nothing that was requested is missing or broken."""


class Container(Protocol):
    """A file that contains others: a tar, or a table with pictures in its cells."""

    def open(self, part: str) -> BinaryIO:
        """The bytes of `part`, as a new seekable stream at every call. Several threads may call it at once."""


@dataclass(frozen=True, slots=True)
class Locator:
    """The location of the bytes of a picture or clip.

    Attributes:
        file: the path of the file that holds them; a text, since there may be a million of them.
        part: "" for the whole file; the name of the member of a tar, or "row 17, column image" of a table.
        container: what opens the part.
    """

    file: str
    part: str = ""
    container: Container | None = field(default=None, compare=False, repr=False)

    def __reduce__(self) -> tuple[Any, ...]:
        # For processes that hand a million of them on: what a dataclass does by itself takes several times as long.
        return Locator, (self.file, self.part, self.container)

    def __str__(self) -> str:
        return printable(f"{self.file}: {self.part}" if self.part else self.file)

    @property
    def path(self) -> Path:
        return Path(self.file)

    def open(self) -> BinaryIO:
        """A seekable stream of the bytes, a new one at every call."""
        return self.container.open(self.part) if self.container else open(self.file, "rb")

    @property
    def source(self) -> Source:
        """The same in the form that the decoders of pictures take."""
        return Blob(str(self), self.open) if self.part else self.path


@dataclass(frozen=True, slots=True)
class Entry:
    """A sample as its source lists it.

    Attributes:
        captions: as written, before any processing; at least one, which may be "".
        controls: one for each control path or data_file_key, in order.
        repeats: of this sample, multiplied with those of its directory.
    """

    media: Locator
    captions: tuple[str, ...]
    controls: tuple[Locator, ...] = ()
    mask: Locator | None = None
    repeats: float = 1.0


@dataclass(frozen=True, slots=True)
class Rejected:
    """A file or row that is not used.

    Attributes:
        location: the file, or the row as in "metadata.csv row 17".
        kind: what is wrong, for counting.
        reason: what is wrong and how to mend it.
    """

    location: str
    kind: Kind
    reason: str


@dataclass(frozen=True)
class Remark:
    """Something to be told about what is used: what is remarkable, the file (or folder), and its own numbers with what
    to do about them."""

    title: str
    file: str
    text: str


@dataclass(frozen=True)
class Listing:
    """Everything that a directory holds, in order of name.

    Attributes:
        entries: what can be used, as far as can be said without opening pictures.
        rejected: what cannot be used.
        problems: why the directory as a whole cannot be used.
        idle: the reasons why keys have no effect on this kind of source, by key.
        remarks: what is to be told about what is used.
    """

    entries: list[Entry] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    idle: dict[str, str] = field(default_factory=dict)
    remarks: list[Remark] = field(default_factory=list)


class Fault(ValueError):
    """Why one file or row is not used."""

    def __init__(self, kind: Kind, reason: str) -> None:
        super().__init__(_printable(reason))
        self.kind = kind

    def at(self, location: str) -> Rejected:
        return Rejected(_printable(location), self.kind, str(self))


class SourceProblem(ValueError):
    """Why a directory cannot be used as a whole."""

    def __init__(self, reason: str) -> None:
        super().__init__(_printable(reason))


def _printable(text: str) -> str:
    """`text` without surrogates for bytes that are not UTF-8, which no log or file accepts."""
    return text if text.isascii() else text.encode(errors="backslashreplace").decode()
