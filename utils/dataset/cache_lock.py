"""Locks of folders. One run at a time fills a cache, or goes on in the folder of a run, and the next one is told which
run that is. While any run reads a cache, nothing is deleted that this run may want."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import BinaryIO, Self

from utils.dataset.databases import FOR_THE_GROUP
from utils.dataset.shards import lock
from utils.errors import UserError

LOCK_NAME = "cache.lock"
READERS_NAME = "readers.lock"
SECONDS_BETWEEN_TRIES = 0.5


class CacheBusy(UserError):
    """Another run holds the cache."""


class HeldFile:
    """A file that one process at a time holds, and that says who it is.

    It is a kernel lock (flock) that ends with the process; the file stays. It works between machines if the file system
    passes such locks on: NFS, CephFS, GPFS, Lustre mounted with `flock`. On file systems without locks, every process
    gets it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: BinaryIO | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def take(self) -> bool:
        """Takes the file, unless another process holds it. Returns whether it was taken."""
        assert self._file is None, "taken twice"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        file = self.path.open("a+b", buffering=0)
        if not lock(file, without=True):
            file.close()
            return False
        self._file = file
        now = datetime.now().astimezone().isoformat(" ", "seconds")
        # The lock is valid without the holder's name too, if the disk is full.
        with suppress(OSError):
            file.truncate(0)
            file.write(f"host {socket.gethostname()}, pid {os.getpid()}, since {now}\n".encode())
        return True

    def release(self) -> None:
        """Lets the file go, if it is held."""
        if self._file is not None:
            with suppress(OSError):
                self._file.truncate(0)
            self._file.close()
            self._file = None

    def holder(self) -> str:
        """A description of the last holder; a process that is just taking the file has not written its own yet."""
        return self.path.read_text(errors="replace").strip() or "a run that is just starting"


class CacheLock(HeldFile):
    """What the main process of a run holds while the run fills the cache; reading needs no lock."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder / LOCK_NAME)

    def acquire(self, wait_seconds: float, on_wait: Callable[[str], None]) -> None:
        """Takes the lock, and waits for it if necessary.

        Args:
            on_wait: called with the holder (host, pid, since when) when waiting begins and whenever the holder changes.

        Raises:
            CacheBusy: another run still holds it after this many seconds.
            UserError: this user may not write it.
        """
        deadline = time.monotonic() + wait_seconds
        told = ""
        while not self._taken():
            holder = self.holder()
            if time.monotonic() >= deadline:
                what = f"another run fills this cache: {holder}; wait for it or end it, or use another cache"
                raise CacheBusy.of(what, str(self.path))
            if holder != told:
                on_wait(holder)
                told = holder
            time.sleep(min(SECONDS_BETWEEN_TRIES, max(0.0, deadline - time.monotonic())))

    def _taken(self) -> bool:
        try:
            return self.take()
        except PermissionError as error:
            raise _not_writable(self.path, error) from error


def _opened(path: Path) -> BinaryIO:
    """A file to be locked, made if it is missing. Some network file systems lock only what is open for writing.

    Raises:
        UserError: this user may not write it.
    """
    try:
        return path.open("a+b", buffering=0)
    except PermissionError as error:
        raise _not_writable(path, error) from error


def _not_writable(path: Path, error: OSError) -> UserError:
    return UserError.of(f"cannot be used ({error.strerror}); {FOR_THE_GROUP}", str(path))


def reading(folder: Path) -> BinaryIO:
    """Marks a cache as being read until the returned file is closed or the process ends. Must be called while this run
    fills the cache, since no other run can then hold it for `unread`."""
    file = _opened(folder / READERS_NAME)
    lock(file, without=True, shared=True)
    return file


@contextmanager
def unread(folder: Path) -> Iterator[bool]:
    """Whether no run reads the cache; if so, no run can begin to read it within this context. False on file systems
    without locks."""
    with _opened(folder / READERS_NAME) as file:
        yield lock(file, without=False)
