"""Which run fills a cache: one at a time, and it has a name that the next one is told. And which ones read it: while
there is any, nothing that it may have asked for is deleted."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import BinaryIO, Self

from utils.dataset.shards import lock
from utils.errors import UserError

LOCK_NAME = "cache.lock"
READERS_NAME = "readers.lock"
SECONDS_BETWEEN_TRIES = 0.5


class CacheBusy(UserError):
    """Another run holds the cache."""


class CacheLock:
    """Held by the main process of a run while the run fills the cache; reading needs none.

    The lock is the kernel's (flock on a file of the cache's folder) and ends with the process; the file says who has
    it, and stays. Between machines it holds where the file system passes such locks on: NFS, CephFS, GPFS, Lustre
    mounted with `flock`. Where there are no locks, everybody gets it.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / LOCK_NAME
        self._file: BinaryIO | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def acquire(self, wait_seconds: float, on_wait: Callable[[str], None]) -> None:
        """Takes the lock, waiting for it if need be.

        Args:
            on_wait: told who holds it (host, pid, since when), when waiting begins and whenever the holder changes.

        Raises:
            CacheBusy: after so many seconds another run still holds it.
        """
        assert self._file is None, "acquired twice"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        file = self.path.open("a+b", buffering=0)
        deadline = time.monotonic() + wait_seconds
        told = ""
        try:
            while not lock(file, without=True):
                holder = self.holder()
                if time.monotonic() >= deadline:
                    what = f"another run fills this cache: {holder}; wait for it or end it, or use another cache"
                    raise CacheBusy.of(what, str(self.path))
                if holder != told:
                    on_wait(holder)
                    told = holder
                time.sleep(min(SECONDS_BETWEEN_TRIES, max(0.0, deadline - time.monotonic())))
            now = datetime.now().astimezone().isoformat(" ", "seconds")
            # The lock is good without a name too, on a disk that is full.
            with suppress(OSError):
                file.truncate(0)
                file.write(f"host {socket.gethostname()}, pid {os.getpid()}, since {now}\n".encode())
        except BaseException:
            file.close()
            raise
        self._file = file

    def release(self) -> None:
        """Gives the lock back, if held."""
        if self._file is not None:
            self._file.truncate(0)
            self._file.close()
            self._file = None

    def holder(self) -> str:
        """Who took the lock last, in words; one that is taking it has not said so yet."""
        return self.path.read_text().strip() or "a run that is just starting"


def reading(folder: Path) -> BinaryIO:
    """Marks a cache as read until the file that comes back is closed, or the process ends. Called while the cache is
    filled by this run: nobody has it for `unread` then."""
    file = (folder / READERS_NAME).open("a+b", buffering=0)
    lock(file, without=True, shared=True)
    return file


@contextmanager
def unread(folder: Path) -> Iterator[bool]:
    """Whether no run reads the cache; then none begins to before the end of this. False where there are no locks."""
    with (folder / READERS_NAME).open("a+b", buffering=0) as file:
        yield lock(file, without=False)
