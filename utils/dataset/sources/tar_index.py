"""The positions of the members of a tar, so that each can be read without reading those before it."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from utils.dataset.sources.locators import Kind, SourceProblem
from utils.dataset.sources.texts import is_utf8
from utils.json_files import parsed_json

_COMPRESSIONS = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_MEMBERS_BETWEEN_HEEDS = 1024


@dataclass(frozen=True)
class TarIndex:
    """Offset and length in bytes of each member by name, and the problems of others: name, kind and reason."""

    path: Path
    members: dict[str, tuple[int, int]]
    faults: list[tuple[str, Kind, str]]

    def open(self, part: str) -> BinaryIO:
        return io.BufferedReader(_Window(self.path.open("rb", buffering=0), *self.members[part]))


class _Window(io.RawIOBase):
    """A section of a file as a file; closing it closes the file."""

    def __init__(self, file: io.FileIO, offset: int, length: int) -> None:
        self._file, self._offset, self._length, self._position = file, offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        wanted = min(len(buffer), max(0, self._length - self._position))
        self._file.seek(self._offset + self._position)
        count = self._file.readinto(memoryview(buffer)[:wanted])
        self._position += count
        return count

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        origin = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._length}[whence]
        if origin + offset < 0:
            raise ValueError("before the beginning of the file")
        self._position = origin + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def close(self) -> None:
        self._file.close()
        super().close()


def index_tar(path: Path, raise_if_stopping: Callable[[], None], remember: Path | None) -> TarIndex:
    """The index of a tar, from storage or by reading through the tar.

    Args:
        remember: the folder that stores the indices of tars by path, size and modification time; None to store none.

    Raises:
        SourceProblem: it is not a tar, or a compressed one.
    """
    try:
        status = path.stat()
        stamp = [status.st_size, status.st_mtime_ns]
        kept = remember and remember / f"{hashlib.blake2b(str(path).encode(), digest_size=16).hexdigest()}.json"
        if kept and (index := _recalled(path, kept, stamp)):
            return index
        index = _walked(path, raise_if_stopping)
    except OSError as error:
        raise SourceProblem(f"{path} cannot be read ({error.strerror})") from None
    if kept:
        kept.parent.mkdir(parents=True, exist_ok=True)
        # Renamed into place: several processes may write it at once.
        new = kept.with_suffix(f".{os.getpid()}")
        found = {"members": index.members, "faults": index.faults}
        new.write_text(json.dumps({"stamp": stamp, **found, "sum": _sum(found)}))
        new.replace(kept)
    return index


def _recalled(path: Path, kept: Path, stamp: list[int]) -> TarIndex | None:
    try:
        content = parsed_json(kept.read_bytes())
        found = {key: content[key] for key in ("members", "faults")}
        is_known = content["stamp"] == stamp and content["sum"] == _sum(found)
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return None
    return TarIndex(path, **found) if is_known else None


def _sum(found: dict[str, object]) -> int:
    """A checksum, since what is lost of an index would be lost of the tar without a word."""
    return zlib.crc32(json.dumps(found).encode())


def _walked(path: Path, raise_if_stopping: Callable[[], None]) -> TarIndex:
    with path.open("rb") as file:
        start = file.read(8)
    for magic, name in _COMPRESSIONS.items():
        if start.startswith(magic):
            raise SourceProblem(f"{path} is compressed by {name}, and can only be read from its start; decompress it")
    index = TarIndex(path, {}, [])
    try:
        with tarfile.open(path, "r:") as tar:
            count = 0
            while member := tar.next():
                _add(index, member)
                # It keeps all members that it has read, about a kilobyte for each.
                tar.members.clear()
                count += 1
                if count % _MEMBERS_BETWEEN_HEEDS == 0:
                    raise_if_stopping()
            is_whole = not _block(path, tar.offset).strip(b"\0")
    except tarfile.TarError as error:
        if not index.members:
            raise SourceProblem(f"{path} cannot be read as a tar ({error}); bring it anew") from None
        is_whole = False
    if not is_whole:
        _cut(index)
    return index


def _cut(index: TarIndex) -> None:
    """Reports that the tar is damaged behind its last member, and drops that member if part of it is missing."""
    last, (offset, length) = next(reversed(index.members.items()), ("", (0, 0)))
    reason = "the tar is broken off or damaged from here on; bring it anew"
    index.faults.append((last, "unreadable", reason))
    if offset + length > index.path.stat().st_size:
        index.members.pop(last, None)


def _block(path: Path, offset: int) -> bytes:
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(tarfile.BLOCKSIZE)


def _add(index: TarIndex, member: tarfile.TarInfo) -> None:
    name = member.name.removeprefix("./")
    if member.isdir() or os.path.basename(name).startswith("."):
        return
    if not is_utf8(name):
        index.faults.append((ascii(name)[1:-1], "name not UTF-8", "the name is not UTF-8; pack the tar anew"))
    elif not member.isreg() or member.issparse():
        index.faults.append((name, "unreadable", "is no plain file; pack the tar without links and holes"))
    elif name in index.members:
        index.faults.append((name, "twice", "is in the tar more than once; the first is used"))
    else:
        index.members[name] = (member.offset_data, member.size)
