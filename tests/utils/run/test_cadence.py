"""When something is due."""

from __future__ import annotations

import pytest

from utils.run.cadence import Cadence
from utils.run.progress import Progress

STEPS_PER_EPOCH, EXAMPLES_PER_STEP = 4, 6


def due_steps(cadence: Cadence, steps: int = 24) -> list[int]:
    """The steps after which it is due, in a run of three steps an epoch."""
    progress, due = Progress(), []
    for _ in range(steps):
        done = progress.after_step(1.0, EXAMPLES_PER_STEP)
        ended = done.step_in_epoch == STEPS_PER_EPOCH
        if cadence.due(progress, done, ended):
            due.append(done.step)
        progress = done.next_epoch() if ended else done
    return due


@pytest.mark.parametrize(
    ("intervals", "expected"),
    [
        ({"steps": 5}, [5, 10, 15, 20]),
        ({"epochs": 2}, [8, 16, 24]),
        ({"examples": 25}, [5, 9, 13, 17, 21]),
        ({"steps": 10, "epochs": 3}, [10, 12, 20, 24]),
        ({}, []),
        ({"minutes": 1.0}, []),
    ],
)
def test_due(intervals: dict, expected: list[int]) -> None:
    assert due_steps(Cadence(**intervals)) == expected


def test_minutes_count_from_the_last_restart() -> None:
    now = [0.0]
    cadence = Cadence(minutes=2.0, clock=lambda: now[0])
    now[0] = 119.0
    assert not cadence.overdue()
    now[0] = 121.0
    assert cadence.overdue()
    cadence.restart()
    assert not cadence.overdue()
    assert not Cadence(steps=1).overdue()


def test_progress_keeps_the_mean_loss_of_the_epoch() -> None:
    progress = Progress().after_step(1.0, 2).after_step(3.0, 2)
    assert (progress.step, progress.step_in_epoch, progress.examples, progress.epoch_loss) == (2, 2, 4, 2.0)
    after = progress.next_epoch()
    assert after.after_step(None, 2).after_step(3.0, 2).epoch_loss == 3.0
    assert Progress.of_file(progress.as_dict()) == progress
    assert (after.epoch, after.step_in_epoch, after.step, after.epoch_loss) == (1, 0, 2, 0.0)


def test_progress_of_an_earlier_version_has_a_loss_for_each_step() -> None:
    values = {"step": 9, "epoch": 1, "step_in_epoch": 4, "examples": 36, "epoch_loss_sum": 8.0}
    assert Progress.of_file(values).epoch_loss == 2.0
