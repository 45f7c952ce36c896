"""Noising and targets against the scheduler of diffusers.

Shapes: B batch; pictures (B C h w), clips (B C f h w).
"""

from __future__ import annotations

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from utils.diffusion.objectives import FlowMatching
from utils.diffusion.seeds import normal

SHAPES = [(3, 4, 6, 8), (3, 4, 5, 6, 8)]


@pytest.mark.parametrize("shape", SHAPES)
def test_noised_is_what_the_scheduler_makes(shape: tuple[int, ...]) -> None:
    clean, noise = normal(shape, 0, "clean"), normal(shape, 0, "noise")
    scheduler = FlowMatchEulerDiscreteScheduler()
    timesteps = scheduler.timesteps[[0, 400, 999]]
    noised = FlowMatching().noised(clean, noise, timesteps / 1000)
    torch.testing.assert_close(noised, scheduler.scale_noise(clean, timesteps, noise), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("reversed_sign", [False, True])
def test_an_euler_step_along_the_target_ends_at_the_picture(shape: tuple[int, ...], reversed_sign: bool) -> None:
    """From every noise level, one step of the stock scheduler to 0 along the velocity."""
    objective = FlowMatching(predicts_data_minus_noise=reversed_sign)
    clean, noise = normal(shape, 0, "clean"), normal(shape, 0, "noise")
    for level in (0.1, 0.5, 1.0):
        t_B = torch.full((3,), level)
        scheduler = FlowMatchEulerDiscreteScheduler()
        scheduler.set_timesteps(sigmas=[level])
        x_t, target = objective.noised(clean, noise, t_B), objective.target(clean, noise, t_B)
        (arrived,) = scheduler.step(objective.for_scheduler(target), scheduler.timesteps[0], x_t, return_dict=False)
        torch.testing.assert_close(arrived, clean, rtol=1e-5, atol=1e-5)


def test_sign_of_the_prediction() -> None:
    clean, noise, t_B = torch.tensor([[2.0]]), torch.tensor([[5.0]]), torch.tensor([0.3])
    assert FlowMatching().target(clean, noise, t_B).item() == 3.0
    assert FlowMatching(predicts_data_minus_noise=True).target(clean, noise, t_B).item() == -3.0
    assert FlowMatching().noised(clean, noise, t_B).item() == pytest.approx(0.7 * 2 + 0.3 * 5)


def test_every_sample_has_its_own_level() -> None:
    clean, noise = torch.zeros(2, 1, 2, 2), torch.ones(2, 1, 2, 2)
    noised = FlowMatching().noised(clean, noise, torch.tensor([0.25, 0.75]))
    assert torch.equal(noised, torch.tensor([0.25, 0.75]).view(2, 1, 1, 1).expand(2, 1, 2, 2))
