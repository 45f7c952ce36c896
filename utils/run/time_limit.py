"""The time that a run has, for machines that are taken away at an hour that is known."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable

STEPS_REMEMBERED = 20
"""The slowest of so many last steps tells how long the next one may take."""
MOST_IN_RESERVE = 60.0
PART_IN_RESERVE = 0.05
"""What is kept in reserve, in seconds or as a part of the time: the processes have to end, and nobody has measured
that."""
BYTES_A_SECOND = 200e6
"""How fast a checkpoint is taken to be written, before one was."""


class TimeLimit:
    """When a run has to begin its end, so that it is over in time.

    Args:
        seconds: how long the run may take.
        started: when it began, on the `clock`, in seconds.

    Attributes:
        state_bytes: the size of what a checkpoint holds of this process.
    """

    def __init__(self, seconds: float, started: float, clock: Callable[[], float] = time.monotonic):
        self.ends_at = started + seconds - min(MOST_IN_RESERVE, PART_IN_RESERVE * seconds)
        self.clock = clock
        self.state_bytes = 0
        self._steps: deque[float] = deque(maxlen=STEPS_REMEMBERED)
        self._longest: dict[str, float] = {}

    def step_took(self, seconds: float) -> None:
        """Remembers how long a step took."""
        self._steps.append(seconds)

    def took(self, what: str, seconds: float) -> None:
        """Remembers how long something between steps took."""
        self._longest[what] = max(seconds, self._longest.get(what, 0.0))

    def is_up(self) -> bool:
        """Whether the time just suffices for what has to be saved."""
        return self.clock() + self._saving() >= self.ends_at

    def is_up_after(self, further: Iterable[str]) -> bool:
        """Whether the time does not suffice for one more step and what is due after it, by their names."""
        expected = max(self._steps, default=0.0) + sum(self._longest.get(what, 0.0) for what in further)
        return self.clock() + expected + self._saving() >= self.ends_at

    def _saving(self) -> float:
        return self._longest.get(CHECKPOINT, self.state_bytes / BYTES_A_SECOND) + self._longest.get(EXPORT, 0.0)


CHECKPOINT, EXPORT = "checkpoint", "export"
"""What is saved at the end of a run."""
