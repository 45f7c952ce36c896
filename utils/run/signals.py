"""Requests to stop: Ctrl-C, SIGTERM, the launcher's death. They are heard at once and obeyed between two steps."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from types import FrameType

SECONDS_OF_REPEATS = 3.0
"""DeepSpeed's launcher passes on a signal that the whole process group got already: the same wish, heard twice."""
STOPPING = (signal.SIGINT, signal.SIGTERM)
LAUNCHER = b"deepspeed.launcher.launch"


class StopRequests:
    """Listens for signals while it is entered. A later second signal ends the process at once."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._launcher = os.getppid() if LAUNCHER in _command_of(os.getppid()) else None
        self._launcher_parent = _parent_of(self._launcher) if self._launcher else None
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopRequests:
        self._before = {number: signal.signal(number, self._on_signal) for number in STOPPING}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received, self.received_at = number, time.monotonic()
        elif time.monotonic() - self.received_at > SECONDS_OF_REPEATS:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    @property
    def exit_code(self) -> int:
        """128 + the signal, as shells have it."""
        return 128 + (self.received or signal.SIGTERM)

    def pending(self) -> bool:
        """Whether this process was asked to stop, or the `deepspeed` command that started its launcher is gone: a
        terminated `deepspeed` leaves launcher and processes behind, and they would train on unseen."""
        orphaned = self._launcher is not None and _parent_of(self._launcher) != self._launcher_parent
        return self.received is not None or orphaned


def _parent_of(process: int) -> int | None:
    """The parent's process id, None where the system does not tell (no /proc)."""
    try:
        return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, ValueError, IndexError):
        return None


def _command_of(process: int) -> bytes:
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:
        return b""
