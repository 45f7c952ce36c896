"""How much memory a process takes for itself while it does something."""

from __future__ import annotations

import threading
from pathlib import Path

MIB = 2**20
SECONDS_BETWEEN_LOOKS = 0.002


class Watch:
    """Looks again and again at how much memory this process has of its own, without files that are mapped.

    Attributes:
        most: in bytes, beyond what there was at the beginning.
    """

    def __init__(self) -> None:
        self.most, self._before = 0, _own_bytes()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._done.wait(SECONDS_BETWEEN_LOOKS):
            self.most = max(self.most, _own_bytes() - self._before)


def _own_bytes() -> int:
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Anonymous:"))
