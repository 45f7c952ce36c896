"""The variational term against an evaluation in float64, with torch's distributions and an integral.

Shapes: B batch, C channels.
"""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import DDPMScheduler
from torch.distributions import Normal, kl_divergence

from utils.diffusion.learned_variance import hybrid_factor, variational_bound
from utils.diffusion.objectives import Epsilon, VPrediction
from utils.diffusion.schedules import NoiseSchedule
from utils.diffusion.seeds import normal

SHAPE = (3, 4, 5, 5)
LEVELS = torch.tensor([0.001, 0.4, 0.999])
OBJECTIVES = [Epsilon(learns_sigma=True), VPrediction(learns_sigma=True)]


def inputs_of(objective: Epsilon, levels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    clean = normal(SHAPE, 0, "clean").clamp(-1.5, 1.5)
    noise = normal(SHAPE, 0, "noise")
    mean_part = objective.target(clean, noise, levels) + 0.1 * normal(SHAPE, 0, "error")
    output = torch.cat([mean_part, 0.5 * normal(SHAPE, 0, "variance")], dim=1)
    return output, clean, objective.noised(clean, noise, levels)


def reference(output_C, clean, x_t, step: int, objective: Epsilon) -> torch.Tensor:
    """One sample, float64, from the betas on."""
    schedule = objective.schedule
    betas = [(math.sqrt(0.00085) + (math.sqrt(0.012) - math.sqrt(0.00085)) * n / 999) ** 2 for n in range(1000)]
    abars = [1.0, *torch.tensor([1 - beta for beta in betas], dtype=torch.float64).cumprod(0).tolist()]
    assert schedule == NoiseSchedule()
    abar, before, beta = abars[step + 1], abars[step], betas[step]

    mean_part, variance_part = output_C.double().chunk(2)
    if isinstance(objective, VPrediction):
        x_0 = math.sqrt(abar) * x_t - math.sqrt(1 - abar) * mean_part
    else:
        x_0 = (x_t - math.sqrt(1 - abar) * mean_part) / math.sqrt(abar)

    def posterior_mean(x):
        return (math.sqrt(before) * beta * x + math.sqrt(1 - beta) * (1 - before) * x_t) / (1 - abar)

    lowest_step = max(step, 1)
    lowest = betas[lowest_step] * (1 - abars[lowest_step]) / (1 - abars[lowest_step + 1])
    share = (variance_part + 1) / 2
    deviation = (share * math.log(beta) + (1 - share) * math.log(lowest)).exp().sqrt()
    predicted = Normal(posterior_mean(x_0), deviation)
    if step:
        return kl_divergence(Normal(posterior_mean(clean), math.sqrt(lowest)), predicted).mean() / math.log(2)
    upper = torch.where(clean > 0.999, 1.0, predicted.cdf(clean + 1 / 255))
    lower = torch.where(clean < -0.999, 0.0, predicted.cdf(clean - 1 / 255))
    return -(upper - lower).clamp(min=1e-12).log().mean() / math.log(2)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda objective: objective.kind)
def test_is_the_formula(objective: Epsilon) -> None:
    output, clean, x_t = inputs_of(objective, LEVELS)
    expected = [
        reference(*(part[sample].double() for part in (output, clean, x_t)), step, objective)
        for sample, step in enumerate((1, 400, 999))
    ]
    bound_B = variational_bound(output, clean, x_t, LEVELS, objective)
    torch.testing.assert_close(bound_B.double(), torch.stack(expected), rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda objective: objective.kind)
def test_first_step_is_the_likelihood(objective: Epsilon) -> None:
    levels = torch.zeros(3)
    output, clean, x_t = inputs_of(objective, levels)
    expected = [reference(*(part[n].double() for part in (output, clean, x_t)), 0, objective) for n in range(3)]
    bound_B = variational_bound(output, clean, x_t, levels, objective)
    torch.testing.assert_close(bound_B.double(), torch.stack(expected), rtol=1e-3, atol=1e-4)


def test_gradient_reaches_the_variance_alone() -> None:
    """It is that of finite differences there, and 0 at the mean part."""
    objective = OBJECTIVES[0]
    output, clean, x_t = inputs_of(objective, LEVELS)
    output = output.requires_grad_()
    (gradient,) = torch.autograd.grad(variational_bound(output, clean, x_t, LEVELS, objective).sum(), output)
    assert torch.equal(gradient[:, :4], torch.zeros(SHAPE))

    def at(change: float) -> float:
        moved = output.detach().clone()
        moved[1, 6, 2, 3] += change
        return reference(moved[1].double(), clean[1].double(), x_t[1].double(), 400, objective).item()

    assert gradient[1, 6, 2, 3].item() == pytest.approx((at(1e-4) - at(-1e-4)) / 2e-4, rel=1e-3)


def test_variance_is_that_of_the_scheduler() -> None:
    """The divergence is least where the variance is the posterior's (v = -1), as of diffusers' `learned_range`."""
    scheduler = DDPMScheduler(1000, 0.00085, 0.012, "scaled_linear", variance_type="learned_range")
    for v in (-1.0, 0.3, 1.0):
        log_variance = scheduler._get_variance(400, torch.tensor(v)).item()
        betas, abars = scheduler.betas.double(), scheduler.alphas_cumprod.double()
        lowest = betas[400] * (1 - abars[399]) / (1 - abars[400])
        share = (v + 1) / 2
        assert log_variance == pytest.approx((share * betas[400].log() + (1 - share) * lowest.log()).item(), rel=1e-4)
    objective, levels = OBJECTIVES[0], torch.full((3,), 0.4)
    clean, noise = normal(SHAPE, 0, "clean"), normal(SHAPE, 0, "noise")
    x_t = objective.noised(clean, noise, levels)
    exact = torch.cat([noise, torch.full(SHAPE, -1.0)], dim=1)
    torch.testing.assert_close(
        variational_bound(exact, clean, x_t, levels, objective), torch.zeros(3), rtol=0, atol=1e-5
    )


def test_hybrid_factor_is_one_thousandth_of_the_sum_over_all_steps() -> None:
    assert hybrid_factor(NoiseSchedule()) == pytest.approx(1.0)
    assert hybrid_factor(NoiseSchedule(steps=250)) == pytest.approx(0.25)
