"""The terminal, pipe or file that shows a run, which may go away while the run does not."""

from __future__ import annotations

import errno
import os
import sys
import traceback
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

LOG = "log.txt"
"""What cannot be shown goes into this file of the run's folder."""
MAY_COME_BACK = (errno.ENOSPC, errno.EDQUOT, errno.EAGAIN, errno.EINTR)
"""After these, what comes later is tried again: a full disk may have room then."""
PIECES_KEPT = 2000
"""What is kept as long as there is no folder."""


class Unshown:
    """What could not be shown: in a file, once it is known where."""

    def __init__(self) -> None:
        self.path: Path | None = None
        self.waiting: deque[str] = deque(maxlen=PIECES_KEPT)

    def place(self, folder: Path) -> None:
        """From here on, what cannot be shown goes into this folder, beginning with what has waited for that."""
        self.path = folder / LOG
        self._write()

    def keep(self, text: str) -> None:
        # What moves a cursor is a progress bar's, and out of date when it is read.
        if "\r" not in text and "\x1b" not in text:
            self.waiting.append(text)
            self._write()

    def _write(self) -> None:
        if self.path is None or not self.waiting:
            return
        with suppress(OSError), self.path.open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.write("".join(self.waiting))
            file.flush()
            self.waiting.clear()


class Shown:
    """A standard stream whose writing never fails. What it does not take goes to `unshown`.

    Args:
        stream: None if it is closed.
    """

    def __init__(self, stream: IO[str] | None, name: str, unshown: Unshown):
        self.stream, self.name, self.unshown = stream, name, unshown
        self.failed = self.is_gone = False
        if stream is None:
            self._lose(OSError(errno.EBADF, "it is closed"))

    def write(self, text: str) -> int:
        if self.is_gone:
            self.unshown.keep(text)
            return len(text)
        try:
            self.stream.write(text)
            # At once, or the error would be met later, when the text is lost.
            self.stream.flush()
        except (OSError, ValueError) as error:
            self._lose(error)
            self.unshown.keep(text)
        return len(text)

    def writelines(self, lines: list[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        if not self.is_gone:
            try:
                self.stream.flush()
            except (OSError, ValueError) as error:
                self._lose(error)

    def isatty(self) -> bool:
        return not self.is_gone and self.stream.isatty()

    def fileno(self) -> int:
        if self.stream is None:
            raise OSError(errno.EBADF, "is closed")
        return self.stream.fileno()

    def __getattr__(self, attribute: str) -> Any:
        return getattr(self.stream, attribute)

    def give_up(self) -> None:
        """Lets everything that is still written to the stream go nowhere, whoever writes it, without an error."""
        self.is_gone = True
        with suppress(OSError, ValueError, AttributeError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.stream.fileno())
            os.close(nowhere)

    def _lose(self, error: Exception) -> None:
        if not self.failed:
            self.failed = True
            reason = error.strerror if isinstance(error, OSError) else error
            self.unshown.keep(f"{self.name} cannot be written ({reason}); what it does not take is here\n")
        if getattr(error, "errno", None) not in MAY_COME_BACK:
            self.give_up()


@contextmanager
def guarded_streams() -> Iterator[None]:
    """Within this, what is written to stdout and stderr never raises an error, and neither does the end of the process.
    What they do not take goes to `log.txt` of the run's folder, once that is known; see `go_on_in`."""
    _fill_closed()
    before, unshown = (sys.stdout, sys.stderr), Unshown()
    shown = [Shown(stream, name, unshown) for stream, name in zip(before, ("stdout", "stderr"), strict=True)]
    sys.stdout, sys.stderr = shown
    try:
        yield
    except BaseException as error:
        if shown[1].failed and not isinstance(error, SystemExit):
            unshown.keep("".join(traceback.format_exception(error)))
        raise
    finally:
        for stream in shown:
            stream.flush()
            if stream.failed:
                # Python flushes both at its end, which must not end with another code then.
                stream.give_up()
        sys.stdout, sys.stderr = before


def go_on_in(folder: Path) -> None:
    """Tells where what cannot be shown is to go."""
    if isinstance(sys.stderr, Shown):
        sys.stderr.unshown.place(folder)


def _fill_closed() -> None:
    """Opens nothing where a standard stream is closed: the next file that is opened would get its number, and what
    libraries write to their stderr."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # The lowest free number is taken.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
