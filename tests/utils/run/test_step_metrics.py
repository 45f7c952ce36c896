"""Where the time of a step goes."""

from __future__ import annotations

import time

import pytest
import torch
from deepspeed.runtime.pipe import schedule

from optimizers.found_rates import distance_of, rates_of
from utils.parallel.step_times import StepTimes
from utils.run.step_metrics import bubble_share, is_told_in_full


@pytest.mark.parametrize(
    ("seconds", "micro_batches", "share"),
    [
        # GPipe's (p - 1) / (m + p - 1) where stages are alike.
        ([4.0, 4.0], 4, 1 / 5),
        ([8.0, 8.0, 8.0, 8.0], 8, 3 / 11),
        ([1.0, 1.0], 1, 1 / 2),
        # Of 2 micro-batches: 1 + 3 + 3 seconds, in which the stages compute for 2 and 6.
        ([2.0, 6.0], 2, 1 - 4 / 7),
        ([0.0, 0.0], 2, 0.0),
    ],
)
def test_the_share_in_which_stages_wait(seconds: list[float], micro_batches: int, share: float) -> None:
    assert bubble_share(seconds, micro_batches) == pytest.approx(share)


def test_pieces_of_stages_wait_less() -> None:
    assert bubble_share([4.0, 4.0], 4, pieces=2) == pytest.approx(1 / 9)
    assert bubble_share([3.0] * 4, 8, pieces=3) == pytest.approx(3 / 27)
    # A single micro-batch is in one stage at a time, whatever its pieces.
    assert bubble_share([1.0, 1.0], 1, pieces=2) == pytest.approx(1 / 2)


def test_the_parts_of_a_step_are_measured_between_begin_and_read() -> None:
    times = StepTimes(torch.device("cpu"))

    def work(seconds: float) -> None:
        time.sleep(seconds)

    kinds = (schedule.ForwardPass, schedule.BackwardPass, schedule.RecvGrad, schedule.LoadMicroBatch)
    timed = times.timed(dict.fromkeys(kinds, work))
    assert timed[schedule.LoadMicroBatch] is work
    timed[schedule.ForwardPass](0.0)
    times.begin()
    timed[schedule.ForwardPass](0.02)
    timed[schedule.BackwardPass](0.03)
    timed[schedule.RecvGrad](0.01)
    measured = times.read()
    timed[schedule.ForwardPass](0.0)
    assert measured["compute"] == pytest.approx(0.05, abs=0.03) and measured["compute"] >= 0.05
    assert 0.01 <= measured["communication"] < 0.04 and measured["optimizer"] == 0.0
    assert times.read() == {"compute": 0.0, "communication": 0.0, "optimizer": 0.0}


def test_rates_that_optimizers_find() -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    plain = torch.optim.SGD([weight], lr=0.1)
    assert distance_of(plain) == {} and rates_of(plain) == {}
    plain.param_groups[0].update(d=0.5)
    assert distance_of(plain) == {"d": 0.5, "d_times_lr": 0.05}
    plain.state[weight]["rates"] = torch.tensor([1.0, 2.0, 6.0])
    other = torch.nn.Parameter(torch.ones(1))
    plain.state[other]["rates"] = torch.tensor([7.0])
    assert rates_of(plain) == {"mean_rate": 4.0}


def test_later_steps_are_told_in_full_one_in_ten() -> None:
    assert [step for step in range(1, 41) if is_told_in_full(step)] == [*range(1, 11), 20, 30, 40]
