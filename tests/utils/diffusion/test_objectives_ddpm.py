"""Noise prediction, v-prediction and EDM against float64 evaluations of the formulas and the schedulers of diffusers.

Shapes: B batch; pictures (B C h w), clips (B C f h w).
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, EDMEulerScheduler

from utils.diffusion.losses import Labels, Loss
from utils.diffusion.objectives import EDM, Epsilon, FlowMatching, Objective, VPrediction
from utils.diffusion.schedules import NoiseSchedule
from utils.diffusion.seeds import normal

SHAPES = [(3, 4, 6, 8), (3, 4, 5, 6, 8)]
STEPS = torch.tensor([3, 500, 999])
LEVELS = STEPS / 1000
SIGMAS = torch.tensor([0.02, 0.5, 40.0])
PLAIN, ZERO = NoiseSchedule(), NoiseSchedule(zero_terminal_snr=True)


def abar_of(step: int) -> float:
    """SD's schedule by its definition."""
    roots = [math.sqrt(0.00085) + (math.sqrt(0.012) - math.sqrt(0.00085)) * n / 999 for n in range(step + 1)]
    return math.prod(1 - root * root for root in roots)


def of_formula(objective: Objective, clean: np.ndarray, noise: np.ndarray, sample: int) -> tuple:
    """x_t and target of one sample, float64."""
    t = LEVELS[sample].item()
    if isinstance(objective, FlowMatching):
        return (1 - t) * clean + t * noise, (noise - clean) * (-1 if objective.predicts_data_minus_noise else 1)
    if isinstance(objective, EDM):
        sigma, data = t / (1 - t), 0.5
        x, norm = clean + sigma * noise, math.sqrt(sigma**2 + data**2)
        skip, out = data**2 / norm**2, sigma * data / norm
        return x / norm, (clean - skip * x) / out
    abar = abar_of(int(STEPS[sample]))
    x_t = math.sqrt(abar) * clean + math.sqrt(1 - abar) * noise
    return x_t, math.sqrt(abar) * noise - math.sqrt(1 - abar) * clean if isinstance(objective, VPrediction) else noise


OBJECTIVES = [FlowMatching(), FlowMatching(predicts_data_minus_noise=True), Epsilon(), VPrediction(), EDM()]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_loss_and_gradient_are_those_of_the_formula(objective: Objective, shape: tuple[int, ...]) -> None:
    """Of a denoiser that is one number, evaluated in float64 by hand: prediction = w x_t, loss = mean (w x_t - y)^2."""
    clean, noise = normal(shape, 0, "clean"), normal(shape, 0, "noise")
    factor = torch.tensor(0.7, requires_grad=True)
    x_t, target = objective.noised(clean, noise, LEVELS), objective.target(clean, noise, LEVELS)
    labels = Labels(target, torch.ones(3, *[1] * (len(shape) - 1)))
    losses_B = Loss("mse")(objective.compared(factor * x_t), labels)
    (gradient,) = torch.autograd.grad(losses_B.sum(), factor)

    losses, slopes = [], []
    for sample in range(3):
        inputs, wanted = of_formula(objective, clean[sample].double().numpy(), noise[sample].double().numpy(), sample)
        error = 0.7 * inputs - wanted
        losses.append(np.mean(error**2))
        slopes.append(np.mean(2 * error * inputs))
    np.testing.assert_allclose(losses_B.detach(), losses, rtol=3e-6)
    np.testing.assert_allclose(gradient, sum(slopes), rtol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", [Epsilon, VPrediction])
@pytest.mark.parametrize("schedule", [PLAIN, ZERO], ids=str)
def test_noised_and_v_are_the_schedulers(shape: tuple[int, ...], kind: type, schedule: NoiseSchedule) -> None:
    if schedule.zero_terminal_snr and kind is Epsilon:
        pytest.skip("refused, see below")
    clean, noise = normal(shape, 0, "clean"), normal(shape, 0, "noise")
    scheduler = DDPMScheduler(1000, 0.00085, 0.012, "scaled_linear", rescale_betas_zero_snr=schedule.zero_terminal_snr)
    objective = kind(schedule)
    noised, target = objective.noised(clean, noise, LEVELS), objective.target(clean, noise, LEVELS)
    torch.testing.assert_close(noised, scheduler.add_noise(clean, noise, STEPS), rtol=1e-4, atol=1e-4)
    wanted = noise if kind is Epsilon else scheduler.get_velocity(clean, noise, STEPS)
    torch.testing.assert_close(target, wanted, rtol=1e-4, atol=1e-4)
    assert torch.equal(objective.model_time(LEVELS), STEPS)


@pytest.mark.parametrize("kind", [Epsilon, VPrediction])
def test_the_target_leads_back_to_the_picture(kind: type) -> None:
    clean, noise, levels = normal((2, 4, 3, 3), 0, "c").double(), normal((2, 4, 3, 3), 0, "n").double(), LEVELS[:2]
    objective = kind()
    x_t, target = objective.noised(clean, noise, levels), objective.target(clean, noise, levels)
    torch.testing.assert_close(objective.clean_of(target, x_t, levels), clean)


def test_noise_prediction_with_zero_terminal_snr_is_refused() -> None:
    with pytest.raises(ValueError, match="zero terminal SNR needs a model that predicts v"):
        Epsilon(ZERO)
    assert VPrediction(ZERO).snr(torch.ones(1)).item() == 0.0


@pytest.mark.parametrize("kind", [Epsilon, VPrediction])
def test_learned_sigma_leaves_the_first_half(kind: type) -> None:
    output = normal((2, 8, 3, 3), 0, "output")
    objective = kind(learns_sigma=True)
    for part in (objective.compared(output), objective.for_scheduler(output)):
        assert torch.equal(part, output[:, :4])
    assert torch.equal(kind().compared(output), output)


@pytest.mark.parametrize("shape", SHAPES)
def test_edm_is_the_schedulers(shape: tuple[int, ...]) -> None:
    objective, scheduler = EDM(), EDMEulerScheduler(sigma_data=0.5, prediction_type="epsilon")
    clean, noise = normal(shape, 0, "clean") * 0.5, normal(shape, 0, "noise")
    t_B = SIGMAS / (1 + SIGMAS)
    torch.testing.assert_close(objective.sigma(t_B), SIGMAS, rtol=1e-4, atol=0)
    sigma = objective.sigma(t_B).view(-1, *[1] * (len(shape) - 1))
    x = clean + sigma * noise
    torch.testing.assert_close(objective.noised(clean, noise, t_B), scheduler.precondition_inputs(x, sigma))
    torch.testing.assert_close(objective.model_time(t_B), scheduler.precondition_noise(objective.sigma(t_B)))
    output = normal(shape, 0, "output")
    # What the target is, D makes into the clean latents again.
    target = objective.target(clean, noise, t_B)
    torch.testing.assert_close(scheduler.precondition_outputs(x, target, sigma), clean)
    assert torch.equal(objective.for_scheduler(output), output)
    # So is what is predicted of given latents.
    prediction = objective.prediction_of(output, objective.noised(clean, noise, t_B), t_B)
    torch.testing.assert_close(scheduler.precondition_outputs(x, prediction, sigma), output, rtol=1e-4, atol=1e-5)


def test_the_plain_loss_of_edm_is_weighted_as_the_paper_has_it() -> None:
    """(sigma^2 + sigma_data^2) / (sigma sigma_data)^2 * |D - x_0|^2, Karras et al. 2022, table 1."""
    objective = EDM()
    clean, noise, output = (normal((3, 4, 2, 2), 0, name).double() for name in ("clean", "noise", "output"))
    sigma_B = SIGMAS.double()
    t_B, sigma = sigma_B / (1 + sigma_B), sigma_B.view(3, 1, 1, 1)
    scheduler = EDMEulerScheduler(sigma_data=0.5, prediction_type="epsilon")
    denoised = scheduler.precondition_outputs(clean + sigma * noise, output, sigma)
    paper = (sigma**2 + 0.25) / (sigma * 0.5) ** 2 * (denoised - clean) ** 2
    torch.testing.assert_close((output - objective.target(clean, noise, t_B)) ** 2, paper, rtol=1e-6, atol=1e-6)


def test_time_as_the_model_is_told() -> None:
    levels = torch.tensor([0.25, 0.75])
    assert FlowMatching().model_time(levels).tolist() == [0.25, 0.75]
    assert FlowMatching(time_scale=1000.0).model_time(levels).tolist() == [250.0, 750.0]
    assert FlowMatching(time_is_cleanness=True).model_time(levels).tolist() == [0.75, 0.25]


def test_signal_to_noise_ratios() -> None:
    levels = torch.tensor([0.25, 0.5])
    assert FlowMatching().snr(levels).tolist() == [9.0, 1.0]
    assert EDM().snr(levels).tolist() == pytest.approx([9.0, 1.0], rel=1e-6)
    abar = abar_of(250)
    assert Epsilon().snr(levels)[0].item() == pytest.approx(abar / (1 - abar), rel=1e-6)
