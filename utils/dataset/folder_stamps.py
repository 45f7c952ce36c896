"""Whether folders are as they were: a hash of the names, sizes and times of everything in them."""

from __future__ import annotations

import hashlib
import os
import stat
from array import array
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path

from utils.dataset.store_index import on_network

LOOKING = 8
"""Threads that ask a network's disk."""
CHUNK = 2048
_GONE = (-1, -1, -1)


@dataclass(frozen=True)
class Root:
    """A folder that is searched, with `recursive` also in the folders below; or a single file."""

    path: Path
    recursive: bool = False

    def holds(self, file: str) -> bool:
        """Whether a file is one of those that are stamped, by its name alone."""
        if file == str(self.path):
            return True
        folder = f"{self.path}{os.sep}"
        inside = file.removeprefix(folder)
        # What is hidden is not looked at, and what is said with ".." may be anywhere.
        return inside != file and (self.recursive or os.sep not in inside) and f"{os.sep}." not in f"{os.sep}{inside}"


@dataclass(frozen=True)
class Stamp:
    """A hash of what is in some folders, and the time of the newest change in them, in seconds since 1970."""

    digest: str
    newest: float


def stamped(roots: Iterable[Root], raise_if_stopping: Callable[[], None] = lambda: None) -> Stamp | None:
    """The stamp of everything in the folders. A change of a file changes it, since it changes the time of the last
    change of the file (`st_ctime`), which no program can set; so does one of a folder that is not searched itself.
    None if a folder cannot be read.
    """
    roots, digest, newest = list(roots), hashlib.blake2b(digest_size=16), 0
    # Of a local disk several would only be in each other's way.
    with ThreadPoolExecutor(LOOKING if any(on_network(root.path) for root in roots) else 1) as pool:
        for root in roots:
            digest.update(repr(root).encode(errors="surrogateescape"))
            try:
                newest = max(newest, _stamp_root(root, digest, pool, raise_if_stopping))
            except OSError:
                return None
    return Stamp(digest.hexdigest(), newest / 1e9)


def _stamp_root(
    root: Root, digest: hashlib.blake2b, pool: ThreadPoolExecutor, raise_if_stopping: Callable[[], None]
) -> int:
    """Adds a root to the digest. Returns the newest time in it, in nanoseconds since 1970."""
    own = root.path.stat()
    digest.update(repr(_times(own)).encode())
    newest = max(own.st_mtime_ns, own.st_ctime_ns)
    # Links are followed, but not in circles: a folder is not searched below itself.
    folders = [(str(root.path), frozenset({_identity(own)}))] if stat.S_ISDIR(own.st_mode) else []
    while folders:
        folder, above = folders.pop()
        # By the open folder and a name the system finds a file faster than by its path.
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            names = sorted(name for name in os.listdir(descriptor) if name[0] != ".")
            digest.update("\0".join([folder, *names]).encode(errors="surrogateescape"))
            chunks = [names[start : start + CHUNK] for start in range(0, len(names), CHUNK)]
            for times, below in pool.map(partial(_look, descriptor), chunks):
                digest.update(times.tobytes())
                newest = max(newest, *times[1::3], *times[2::3])
                if root.recursive:
                    folders += [(f"{folder}{os.sep}{name}", above | {one}) for name, one in below if one not in above]
                raise_if_stopping()
        finally:
            os.close(descriptor)
    return newest


def _look(folder: int, names: list[str]) -> tuple[array[int], list[tuple[str, tuple[int, int]]]]:
    """Size and times of what has these names in an open folder, and the folders among it with their identities."""
    found, below = [], []
    for name in names:
        try:
            status = os.stat(name, dir_fd=folder)
        except OSError:
            found.append(_GONE)
            continue
        found.append(_times(status))
        if stat.S_ISDIR(status.st_mode):
            below.append((name, _identity(status)))
    return array("q", chain.from_iterable(found)), below


def _times(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino
