"""What the console says of steps."""

from __future__ import annotations

import logging
import re

import pytest

from utils.run.reporting import PEAK_MEMORY, STEPS_OF_MEAN, StepReporter


def lines_of(caplog: pytest.LogCaptureFixture, losses: list[float], every: int, memory: list[float]) -> list[str]:
    caplog.set_level(logging.INFO)
    reporter = StepReporter(0, len(losses), every, active=True)
    for number, loss in enumerate(losses):
        values = {"train/loss": loss, "train/grad_norm": 1.0, "train/lr": 1e-3, "train/step_time_sec": 0.5}
        reporter.step(number + 1, 0, {**values, **({PEAK_MEMORY: memory[number]} if memory else {})})
    reporter.close()
    return [record.getMessage() for record in caplog.records]


def test_a_loss_is_told_beside_the_mean_of_the_last_ones(caplog: pytest.LogCaptureFixture) -> None:
    losses = [float(number) for number in range(STEPS_OF_MEAN + 50)]
    lines = lines_of(caplog, losses, 1, memory=[])
    told = [re.search(r"loss ([\d.]+) \(mean of (\d+): ([\d.]+)\)", line).groups() for line in lines]
    assert told[0] == ("0.0000", "1", "0.0000")
    assert told[3] == ("3.0000", "4", "1.5000")
    assert told[-1] == ("149.0000", "100", "99.5000")
    assert lines[0].startswith("step 1/150  epoch 1  loss") and "0.500 s/step  left 0:" in lines[0]
    assert not any("memory" in line for line in lines)


def test_memory_is_the_most_since_the_last_line(caplog: pytest.LogCaptureFixture) -> None:
    lines = lines_of(caplog, [1.0] * 5, 2, memory=[3.0, 2.0, 1.0, 1.5, 1.25])
    assert [re.search(r"memory ([\d.]+) GiB", line)[1] for line in lines] == ["3.00", "1.50", "1.25"]
