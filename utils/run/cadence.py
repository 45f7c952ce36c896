"""Decides when something is due: after a number of steps, epochs, examples or minutes."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from utils.run.progress import Progress


class Cadence:
    """Decides after each step whether something is due. Several intervals may be given; one of them suffices.

    Args:
        steps, epochs, examples, minutes: intervals; None for never. Epochs count when they are complete.
        clock: the time in seconds; only the main rank's clock decides, see `overdue`.
    """

    def __init__(
        self,
        steps: int | None = None,
        epochs: int | None = None,
        examples: int | None = None,
        minutes: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.steps, self.epochs, self.examples, self.minutes = steps, epochs, examples, minutes
        self.clock = clock
        self.last_time = clock()

    @property
    def ever(self) -> bool:
        """Whether any interval is given."""
        return any(interval is not None for interval in (self.steps, self.epochs, self.examples, self.minutes))

    def due(self, before: Progress, after: Progress, epoch_ended: bool) -> bool:
        """Whether the step from `before` to `after` reached an interval. A pure function of the progress: the same on
        every rank and after a resume. Minutes are separate, see `overdue`."""
        by_steps = self.steps is not None and after.step % self.steps == 0
        by_epochs = self.epochs is not None and epoch_ended and (after.epoch + 1) % self.epochs == 0
        by_examples = self.examples is not None and after.examples // self.examples > before.examples // self.examples
        return by_steps or by_epochs or by_examples

    def overdue(self) -> bool:
        """Whether the minutes have passed since the last `restart`. Clocks differ, so one rank must decide for all."""
        return self.minutes is not None and self.clock() - self.last_time >= 60 * self.minutes

    def restart(self) -> None:
        """Restarts the count of minutes."""
        self.last_time = self.clock()


@dataclass(frozen=True)
class Duty:
    """Something done between two steps: evaluation, sampling, export.

    Attributes:
        name: what it is, for messages.
        perform: does the work; takes the progress, and whether an epoch has just ended.
        cadence: when it is due.
        before_first_step: whether it is also due before training.
        at_end: whether it is also due after the last step.
        file: name of the file in the run's folder that asks for it at any step.
        at_stop: whether it is also due after the step at which the run is stopped.
        interruptible: whether it comes after the checkpoint, and is interrupted or left when the run is asked to stop;
            then the run owes it, and does it first when it goes on.
        measures: name of a number -> whether the duty writes it among the metrics.
        without_steps: does what is still asked for if a run that has come to its end is started again; takes the
            progress.
    """

    name: str
    perform: Callable[[Progress, bool], None]
    cadence: Cadence
    before_first_step: bool = False
    at_end: bool = False
    file: str = ""
    at_stop: bool = False
    interruptible: bool = True
    measures: Callable[[str], bool] = lambda name: False
    without_steps: Callable[[Progress], None] | None = None
