"""DDPM's schedules against the scheduler of diffusers and the published formulas."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr

from utils.diffusion.schedules import NoiseSchedule, rescale_zero_terminal_snr

CONFIGS = [
    {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.03},
    {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02},
    {"beta_schedule": "squaredcos_cap_v2"},
    {"beta_schedule": "linear", "num_train_timesteps": 50},
    {},
]


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_is_the_schedulers(config: dict, zero_terminal_snr: bool) -> None:
    """Which computes in float32: its last digits are lost."""
    scheduler = DDPMScheduler(**config, rescale_betas_zero_snr=zero_terminal_snr)
    schedule = NoiseSchedule.from_config(scheduler.config)
    np.testing.assert_allclose(schedule.abar_N, scheduler.alphas_cumprod.double(), rtol=2e-4, atol=1e-7)
    if not zero_terminal_snr:
        steps = torch.arange(schedule.steps)
        np.testing.assert_allclose(schedule.snr_N, compute_snr(scheduler, steps), rtol=1e-3)


def test_linear_schedule_by_its_definition() -> None:
    left = 1.0
    for number, abar in enumerate(NoiseSchedule("linear", 0.0001, 0.02).abar_N.tolist()):
        left *= 1 - (0.0001 + (0.02 - 0.0001) * number / 999)
        assert abar == pytest.approx(left, rel=1e-12)


def test_zero_terminal_snr_by_its_definition() -> None:
    """The square root of abar is moved and stretched: 0 at the end, as it was at the start, in proportion between."""
    plain_N = NoiseSchedule().abar_N
    rescaled_N = rescale_zero_terminal_snr(plain_N)
    assert rescaled_N[-1] == 0.0
    assert rescaled_N[0].item() == pytest.approx(plain_N[0].item(), rel=1e-14)
    first, last, middle = (math.sqrt(plain_N[n]) for n in (0, -1, 500))
    assert math.sqrt(rescaled_N[500]) == pytest.approx(first * (middle - last) / (first - last), rel=1e-12)


def test_steps_of_noise_levels() -> None:
    schedule = NoiseSchedule()
    whole = torch.arange(1000)
    assert torch.equal(schedule.step(whole.float() / 1000), whole)
    assert torch.equal(schedule.step((whole.float() + 0.5) / 1000), whole)
    assert schedule.step(torch.tensor([0.0, 1.0])).tolist() == [0, 999]


def test_uniform_levels_give_every_step_as_often() -> None:
    levels = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    assert torch.equal(torch.bincount(NoiseSchedule().step(levels)), torch.full((1000,), 100))


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"beta_schedule": "sigmoid"}, "beta_schedule"),
        ({"beta_start": 0.02, "beta_end": 0.01}, "beta_start <= beta_end"),
        ({"trained_betas": [0.1]}, "trained_betas"),
        ({"snr_shift_scale": 0.0}, "snr_shift_scale must be above 0"),
    ],
)
def test_other_schedules_are_refused(wrong: dict, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        NoiseSchedule.from_config(wrong)
