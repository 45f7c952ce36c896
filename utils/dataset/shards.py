"""Shards: files to which items are appended. One writer appends to each, and bytes that the index refers to never
change.

A writer holds an advisory lock (flock) on the shard that it fills until the rows of its last items are committed; the
kernel releases the lock when the process ends for any reason. A shard without a lock never grows again. A shard's name
is never used twice, so what a reader knows about a shard stays true when the shard is gone.

Locks work between machines on NFS, Lustre (mounted with `flock`), CephFS and GPFS. On file systems where they work on
one machine only (sshfs and others with FUSE), two machines must not write to a store at once; on those without locks,
writing works and nothing is ever reclaimed.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import shutil
import sqlite3
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np

from utils.dataset.store_index import Extent
from utils.errors import UserError

SUFFIX = ".shard"
PIECES_PER_CALL = 1024
GATHERED_BYTES = 2**21
SHARDS_KEPT_OPEN = 128
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
UNREADABLE = (errno.ENOENT, errno.ESTALE, errno.EIO)


class WriteFailed(UserError):
    """The store could not be written, because the disk is full or for another reason; its earlier content is
    unchanged."""


class ShardWriter:
    """Appends items to shards of its own; they become part of the store with `commit`.

    Items are gathered and written some megabytes at a time: the page cache then holds the shard in large pieces, from
    which reading is faster by half, and small items do not need a call each.
    """

    def __init__(self, folder: Path, writer_id: str, shard_bytes: int) -> None:
        self._folder, self._shard_bytes = folder, shard_bytes
        self._name = f"{writer_id}-{secrets.token_hex(6)}"
        self._begun = 0
        self._shard: BinaryIO | None = None
        self._gathered = memoryview(bytearray(GATHERED_BYTES))
        # The ends of the last item, of the last written item, and of the last committed item.
        self._end = self._written = self._committed = 0
        self._writing_back = ThreadPoolExecutor(1)
        self._written_back: Future[None] | None = None

    @property
    def uncommitted(self) -> int:
        """The number of bytes that were appended since the last commit."""
        return self._end - self._committed

    def append(self, item: Sequence[bytes | np.ndarray]) -> Extent:
        """Appends an item, given in pieces.

        Raises:
            WriteFailed: there is no room. The item is lost; those before it can still be committed if they fit.
        """
        length = checksum = 0
        for piece in item:
            length += len(piece)
            checksum = zlib.crc32(piece, checksum)
        try:
            if self._shard is None:
                self._begin()
            if self._end - self._written + length > GATHERED_BYTES:
                self._write_gathered()
            if length > GATHERED_BYTES:
                self._write(item, length)
            else:
                self._gather(item)
        except OSError as error:
            failure = self._failure(self._end - self._written + length, error)
            if self._end == 0:
                self.abandon()
            else:
                self._cut(self._written)
            raise failure from error
        extent = Extent(Path(self._shard.name).name, self._end, length, checksum)
        self._end += length
        return extent

    def commit(self, record: Callable[[], None]) -> None:
        """Waits until the appended items are on disk, then calls `record`, which adds them to the index.

        Raises:
            WriteFailed: the disk is full or failed. Everything since the last commit is cut off and lost.
        """
        try:
            if self._shard is not None:
                self._write_gathered()
                os.fsync(self._shard.fileno())
            record()
        except (OSError, sqlite3.DatabaseError) as error:
            failure = self._failure(self.uncommitted, error)
            self.abandon()
            raise failure from error
        self._committed = self._end
        if self._end >= self._shard_bytes:
            self.end()

    def abandon(self) -> None:
        """Cuts off everything since the last commit and ends the shard: after a failed write, a disk may later claim
        that it has the bytes."""
        if self._shard is not None:
            self._cut(self._committed)
            if self._committed == 0:
                with suppress(OSError):
                    os.unlink(self._shard.name)
            self.end()

    def end(self) -> None:
        """Ends the shard; the next item begins a new one."""
        if self._written_back is not None:
            # It must have ended before its descriptor can mean another file. It is only advice, so its failure does not
            # matter.
            self._written_back.exception()
        if self._shard is not None:
            self._shard.close()
        self._shard, self._end, self._written, self._committed = None, 0, 0, 0

    def _begin(self) -> None:
        """Begins a shard that belongs to this process only."""
        while self._shard is None:
            path = self._folder / f"{self._name}-{self._begun}{SUFFIX}"
            self._begun += 1
            shard = path.open("xb", buffering=0)
            # Before it was locked, the new shard belonged to nobody, and another process may have reclaimed it.
            if lock(shard, without=True) and path.exists():
                self._shard = shard
            else:
                shard.close()
        _sync_folder(self._folder)

    def _gather(self, item: Sequence[bytes | np.ndarray]) -> None:
        start = self._end - self._written
        for piece in item:
            self._gathered[start : start + len(piece)] = piece
            start += len(piece)

    def _write_gathered(self) -> None:
        length = self._end - self._written
        if length:
            self._write([self._gathered[:length]], length)

    def _write(self, pieces: Sequence[bytes | np.ndarray | memoryview], length: int) -> None:
        """Writes all of the pieces; a single system call may write fewer."""
        descriptor, start = self._shard.fileno(), self._written
        if len(pieces) > PIECES_PER_CALL:
            pieces = [b"".join(pieces)]
        done = os.pwritev(descriptor, pieces, start)
        if done < length:
            rest = memoryview(b"".join(pieces))
            while done < length:
                done += os.pwrite(descriptor, rest[done:], start + done)
        self._written += length
        # The disk starts writing while further items are made: for dirty pages, this advice starts the writing and
        # keeps them in memory (Linux, mm/fadvise.c). The call takes a while, hence the thread.
        advice = descriptor, start, length, os.POSIX_FADV_DONTNEED
        self._written_back = self._writing_back.submit(os.posix_fadvise, *advice)

    def _cut(self, end: int) -> None:
        # A tail that cannot be cut off is just unreferenced bytes.
        with suppress(OSError):
            os.ftruncate(self._shard.fileno(), end)

    def _failure(self, wanted: int, error: Exception) -> WriteFailed:
        free = shutil.disk_usage(self._folder).free
        what = f"could not write {wanted:,} bytes, with {free:,} bytes free on the disk: {error}"
        path = self._folder if self._shard is None else self._shard.name
        return WriteFailed.of(f"{what}; mend this and start again, what was cached is kept", str(path))


class ShardReader:
    """Reads bytes from shards; several threads may use it.

    Shards are read and not mapped: reading a truncated shard returns fewer bytes, whereas a mapping would end the
    process. The copy from the page cache costs the same.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._open: dict[str, _Descriptor] = {}

    def read(self, shard: str, offset: int, length: int) -> np.ndarray | None:
        """The bytes, as an array of its own; None if they are not there."""
        item = np.empty(length, np.uint8)
        try:
            # Held in a variable: another thread may drop it from the table, which must not close it before the read.
            descriptor = self._open.get(shard) or self._opened(shard)
            done = os.preadv(descriptor.number, [item], offset)
            while 0 < done < length:
                more = os.preadv(descriptor.number, [item[done:]], offset + done)
                done = done + more if more else 0
        except OSError as error:
            if error.errno not in UNREADABLE:
                raise
            done = 0
        if done == length:
            return item
        self._open.pop(shard, None)
        return None

    def close(self) -> None:
        self._open.clear()

    def _opened(self, shard: str) -> _Descriptor:
        descriptor = _Descriptor(self._folder / shard)
        while len(self._open) >= SHARDS_KEPT_OPEN:
            with suppress(KeyError, RuntimeError, StopIteration):
                del self._open[next(iter(self._open))]
        self._open[shard] = descriptor
        return descriptor


class _Descriptor:
    """A file that closes itself when nothing refers to it any more."""

    def __init__(self, path: Path) -> None:
        self.number = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


def lock(file: BinaryIO, *, without: bool, shared: bool = False) -> bool:
    """Takes the file's lock unless another process has it. Returns whether it was taken, or `without` on file systems
    without locks. Many processes can hold a shared lock; then none can hold an exclusive one."""
    try:
        fcntl.flock(file.fileno(), (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        return without
    return True


def sizes(folder: Path) -> dict[str, int]:
    """The size in bytes of every shard in the folder."""
    found = {}
    for entry in os.scandir(folder):
        if entry.name.endswith(SUFFIX):
            with suppress(FileNotFoundError):
                found[entry.name] = entry.stat().st_size
    return found


def _sync_folder(folder: Path) -> None:
    """Synchronises the folder's list of files: a file that was synchronised can still lose its name."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
