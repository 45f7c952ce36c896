"""Requests to stop: Ctrl-C, SIGTERM and others, the death of the launcher, the end of the run's time. They are noted at
once and obeyed when nothing is lost."""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from utils.run.time_limit import TimeLimit
from utils.turn import turn_in_list

if TYPE_CHECKING:
    from utils.run.watch import Watch

logger = logging.getLogger(__name__)

SECONDS_OF_REPEATS = 3.0
"""DeepSpeed's launcher passes on a signal that the whole process group has already received: one request, received
twice."""
DEMANDS = (signal.SIGINT, signal.SIGTERM, signal.SIGQUIT)
"""Who sends one of these a second time wants the end at once."""
NOTICES = (signal.SIGHUP, signal.SIGUSR1, signal.SIGXCPU)
"""A terminal or ssh session that is gone, a job scheduler before the time is up, a limit of processor time: they may be
sent again and again, and what follows them is a demand."""
DEEPSPEED_LAUNCHER = b"deepspeed.launcher.launch"
LAUNCHERS = (DEEPSPEED_LAUNCHER, b"torchrun", b"torch.distributed.run", b"torch.distributed.launch")


class StopRequested(Exception):
    """The current work ends, since the run was asked to stop."""


class StopRequests:
    """Listens for signals within its context. A later second one of `DEMANDS` ends the process at once. A signal that
    was ignored before stays ignored, as under `nohup`.

    Attributes:
        by_file: whether the run ended because of a file in its folder.
        time: the run's time, if it has a limit.
        late: whether the run ends because of that.
        farewells: called at the very end of the context.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self.by_file = False
        self.time: TimeLimit | None = None
        self.late = False
        self.farewells: list[Callable[[], None]] = []
        self._demanded_at: float | None = None
        self._warned = False
        self._ancestors = _launchers()
        self._before: dict[int, object] = {}

    @cached_property
    def watch(self) -> Watch:
        """Over the other ranks."""
        # It needs torch, for which the command line does not wait.
        from utils.run.watch import Watch

        return Watch()

    def __enter__(self) -> StopRequests:
        heard = [number for number in (*DEMANDS, *NOTICES) if signal.getsignal(number) != signal.SIG_IGN]
        self._before = {number: signal.signal(number, self._on_signal) for number in heard}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *_: object) -> None:
        if isinstance(error, Exception):
            self.watch.failed(error)
            self.watch.linger()
        else:
            self.watch.close()
        for farewell in self.farewells:
            farewell()
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextmanager
    def ending_at_once(self) -> Iterator[None]:
        """A context in which a signal ends the process, for waits inside of libraries: Python's handlers are not called
        as long as these last. What was asked before is for `pending` to tell."""
        before = {number: signal.signal(number, signal.SIG_DFL) for number in self._before}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or number
        if number in NOTICES:
            return
        if self._demanded_at is None:
            self._demanded_at = time.monotonic()
        elif time.monotonic() - self._demanded_at > SECONDS_OF_REPEATS:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    @property
    def exit_code(self) -> int:
        """128 + the signal, as in shells; 0 after a file of the user's, or at the end of the run's time."""
        if self.received is None and (self.by_file or self.late):
            return 0
        return 128 + (self.received or signal.SIGTERM)

    def pending(self) -> bool:
        """Whether this process was asked to stop, or its time is up, or its launcher is gone: a terminated `deepspeed`
        and a killed `torchrun` leave their processes behind, which would go on training unseen."""
        return self.asked() or self.time_is_up()

    def asked(self) -> bool:
        """The same without the time."""
        asked = self.asked_silently()
        if asked and not self._warned:
            # Not in the handler: it may have interrupted the logging of something else.
            self._warned = True
            logger.warning("asked to stop: ending as soon as nothing is lost by it; once more ends at once")
        return asked

    def asked_silently(self) -> bool:
        """The same without a word in the log."""
        return self.received is not None or _launchers() != self._ancestors

    def time_is_up(self) -> bool:
        """Whether the run's time suffices for nothing but its end."""
        is_up = self.time is not None and self.time.is_up()
        if is_up and not self.late:
            logger.warning("the time_limit is near: ending as soon as nothing is lost by it")
        self.late = self.late or is_up
        return is_up

    def raise_if_stopping(self) -> None:
        """Ends what this process is doing, if it was asked to stop.

        Raises:
            StopRequested: it was.
        """
        if self.pending():
            raise StopRequested


def _launchers() -> list[int | None]:
    """The processes that must live as long as this one: the launcher that started it, and the `deepspeed` command that
    started the launcher, or the one that walks a list of configs. A shell is not among them, since it may be closed."""
    launcher = os.getppid()
    if turn_in_list():
        return [launcher]
    command = _command_of(launcher)
    if DEEPSPEED_LAUNCHER in command:
        return [launcher, _parent_of(launcher)]
    return [launcher] if any(name in command for name in LAUNCHERS) else []


def _parent_of(process: int) -> int | None:
    """The parent's process id; None if the system does not say (no /proc)."""
    try:
        return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, ValueError, IndexError):
        return None


def _command_of(process: int) -> bytes:
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:
        return b""
