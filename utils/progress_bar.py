"""Progress with an estimate of the time left: a moving bar on a terminal, a line now and then in a log file."""

from __future__ import annotations

import logging
import sys
import time
from datetime import timedelta
from typing import Self

from tqdm import tqdm

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 30.0


def progress_bar(total: int, what: str, *, first: int = 0, active: bool = True) -> tqdm | LoggedProgress:
    """Counts from `first` to `total`; silent where not `active`. Used as a context manager, moved by `update`."""
    if active and not sys.stderr.isatty():
        return LoggedProgress(total, what)
    return tqdm(total=total, initial=first, desc=what, disable=not active, dynamic_ncols=True)


class LoggedProgress:
    """Logs a line every half minute with the progress, the rate and the time left."""

    def __init__(self, total: int, what: str):
        self.total, self.what, self.done = total, what, 0
        self.started = self.last_line = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def update(self, count: int = 1) -> None:
        self.done += count
        now = time.monotonic()
        if now - self.last_line >= SECONDS_BETWEEN_LINES:
            self.last_line = now
            rate = self.done / (now - self.started)
            left = timedelta(seconds=round((self.total - self.done) / rate))
            logger.info("%s: %d of %d, %.1f a second, left %s", self.what, self.done, self.total, rate, left)
