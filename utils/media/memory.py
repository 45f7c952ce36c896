"""How much host memory may be used for decoded media, and who of a process uses it at the moment."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Condition

from utils.media.source import MediaError

CGROUP = Path("/sys/fs/cgroup")
OWN_CGROUP = Path("/proc/self/cgroup")
MEMINFO = Path("/proc/meminfo")
SHARE_FOR_DECODING = 0.25
FALLBACK_BYTES = 4 * 2**30
LARGE = 64 * 2**20
"""The bytes from which a picture counts; of smaller ones each thread may have one at any time."""


def available_bytes(cgroup: Path = CGROUP, own: Path = OWN_CGROUP, meminfo: Path = MEMINFO) -> int:
    """The number of free bytes, within the limits of the machine and of the control groups (a container, a batch job)
    of this process.

    Args:
        cgroup: the mount point of control groups, version 2, or version 1 with a folder `memory`.
        own: the file that lists the control groups of this process.
    """
    return min([*_of_machine(meminfo), *_of_cgroups(cgroup, own)], default=FALLBACK_BYTES)


def decoding_budget(processes: int) -> int:
    """The bytes of decoded media that each process of a machine may hold."""
    return int(available_bytes() * SHARE_FOR_DECODING / processes)


def _own_budget() -> int:
    return decoding_budget(int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1))


class Room:
    """The memory for large pictures while they are decoded, which the threads of a process share: one waits until
    there is room. A picture that is larger than all of it is decoded while no other large one is.

    Args:
        budget: -> the bytes that all may take.
        free: -> the bytes that are free at most.
    """

    def __init__(self, budget: Callable[[], int] = _own_budget, free: Callable[[], int] = available_bytes):
        self._budget, self._free = budget, free
        self._changed, self._held = Condition(), 0

    @contextmanager
    def taken(self, size: int) -> Iterator[None]:
        """A context in which `size` bytes are in use.

        Raises:
            MediaError: the machine has not so many.
        """
        if size < LARGE:
            yield
            return
        with self._changed:
            budget = self._budget()
            self._changed.wait_for(lambda: not self._held or self._held + size <= budget)
            if size > (free := self._free()):
                raise MediaError(
                    f"takes {size / 2**30:.1f} GiB to be decoded, and {free / 2**30:.1f} GiB of memory are free; scale "
                    "it down, or let other programs end"
                )
            self._held += size
        try:
            yield
        finally:
            with self._changed:
                self._held -= size
                self._changed.notify_all()


@dataclass(frozen=True)
class _Files:
    """The file names of one version of control groups, and its statistic of the page cache."""

    limit: str
    used: str
    cached: str


VERSION_1 = _Files("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
VERSION_2 = _Files("memory.max", "memory.current", "inactive_file")


def _of_machine(meminfo: Path) -> list[int]:
    return [int(line.split()[1]) * 1024 for line in _lines(meminfo) if line.startswith("MemAvailable:")]


def _of_cgroups(cgroup: Path, own: Path) -> list[int]:
    """What is left of each limit, from the process's own group up to the mounted one; any of them may be the lowest."""
    left = []
    for line in _lines(own) or ["0::/"]:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            left += _left(cgroup, path, VERSION_2)
        elif "memory" in controllers.split(","):
            left += _left(cgroup / "memory", path, VERSION_1)
    return left


def _left(mounted: Path, path: str, files: _Files) -> Iterator[int]:
    # In a container the mounted group is its own, and the path may belong to the machine outside.
    group = mounted / path.strip("/")
    for folder in (group, *group.parents):
        limit, used = _lines(folder / files.limit), _lines(folder / files.used)
        if limit and used and limit[0].isdigit():
            statistics = dict(line.split(" ", 1) for line in _lines(folder / "memory.stat"))
            # The page cache is given up when memory is needed.
            yield max(0, int(limit[0]) - int(used[0]) + int(statistics.get(files.cached, 0)))
        if folder == mounted:
            break


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
