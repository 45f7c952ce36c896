"""What the processes of one machine share: memory that is read like a file.

It belongs to no file system, whose room for it may be small (64 MB in containers of Docker), nothing of it is left if
they are killed, and only processes of the same user can open it.
"""

from __future__ import annotations

import os
from pathlib import Path


def machine() -> str:
    """What the processes have in common that see one another: the machine's start, and the namespace of their
    numbers."""
    started = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return f"{started} {os.readlink('/proc/self/ns/pid')}"


def started_at(process: int) -> float:
    """When a process of this machine was started, in seconds since 1970."""
    ticks = int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19])
    booted = next(line for line in Path("/proc/stat").read_text().splitlines() if line.startswith("btime"))
    return int(booted.split()[1]) + ticks / os.sysconf("SC_CLK_TCK")


def memory_file(name: str) -> int:
    """The descriptor of a new and empty file in memory; the name is for people who look at processes."""
    return os.memfd_create(name)


def path_of(process: int, descriptor: int) -> str:
    """Where another process of the machine opens a file of this one, as long as that keeps it open."""
    return f"/proc/{process}/fd/{descriptor}"
