"""The distributions of noise levels against diffusers and against their definitions."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from diffusers.training_utils import compute_density_for_timestep_sampling

from utils.diffusion.timesteps import ResolutionShift, TimestepSampler, shift_by_factor

QUANTILES = [(n + 0.5) / 2000 for n in range(2000)]
LEVELS = np.linspace(0.02, 1.0, 50)


@pytest.mark.parametrize("factor", [0.5, 1.0, 3.0])
def test_constant_shift_is_the_schedulers(factor: float) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=factor)
    scheduler.set_timesteps(sigmas=LEVELS.tolist())
    expected = [shift_by_factor(level, factor) for level in LEVELS]
    np.testing.assert_allclose(scheduler.sigmas[:-1].numpy(), expected, rtol=1e-6)


@pytest.mark.parametrize("tokens", [16, 256, 1000, 4096, 9000])
@pytest.mark.parametrize("constants", [(256, 4096, 0.5, 1.15), (64, 1024, 0.2, 0.9)])
def test_shift_by_size_is_the_schedulers(tokens: int, constants: tuple) -> None:
    mu = calculate_shift(tokens, *constants)
    shift = ResolutionShift(*constants)
    assert math.log(shift.factor(tokens)) == pytest.approx(mu, rel=1e-12)

    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    scheduler.set_timesteps(sigmas=LEVELS.tolist(), mu=mu)
    expected = [TimestepSampler("uniform", shift=shift).timestep(level, tokens) for level in LEVELS[:-1]]
    np.testing.assert_allclose(scheduler.sigmas[:-2].numpy(), expected, rtol=1e-6)


def test_defaults_are_those_of_the_flux_pipeline() -> None:
    assert math.log(ResolutionShift().factor(1234)) == pytest.approx(calculate_shift(1234), rel=1e-12)


@pytest.mark.parametrize("scale", [0.5, 1.0, 2.0])
def test_logit_normal_is_the_density_of_diffusers(scale: float) -> None:
    """Beside the quantiles of a large sample of diffusers' own."""
    torch.manual_seed(0)
    sample = compute_density_for_timestep_sampling("logit_normal", 200_000, logit_mean=0.0, logit_std=scale)
    quantiles = (0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 0.98)
    levels = [TimestepSampler("logit_normal", scale).timestep(u, tokens=1) for u in quantiles]
    np.testing.assert_allclose(np.quantile(sample.numpy(), quantiles), levels, atol=0.005)


def test_quantiles_of_the_logit_normal() -> None:
    """By definition: logit(t) at quantile u is the normal quantile, scaled."""
    sampler = TimestepSampler("logit_normal", sigmoid_scale=1.5)
    for u in QUANTILES[::50]:
        t = sampler.timestep(u, tokens=1)
        assert math.log(t / (1 - t)) == pytest.approx(1.5 * NormalDist().inv_cdf(u), rel=1e-9, abs=1e-9)


def test_uniform_is_the_quantile() -> None:
    assert [TimestepSampler("uniform").timestep(u, tokens=1) for u in QUANTILES] == QUANTILES


SAMPLERS = [
    TimestepSampler(method, 1.0, shift)
    for method in ("logit_normal", "uniform")
    for shift in (None, 3.0, ResolutionShift())
]


@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
def test_levels_rise_with_the_quantile_and_stay_inside(sampler: TimestepSampler) -> None:
    levels = [sampler.timestep(u, tokens=1024) for u in (0.0, *QUANTILES, 1.0)]
    assert all(low < high for low, high in zip(levels, levels[1:], strict=False))
    assert 0.0 < levels[0] and levels[-1] < 1.0


def test_shift_comes_after_the_distribution() -> None:
    plain = TimestepSampler("logit_normal", 1.0).timestep(0.3, tokens=1024)
    assert TimestepSampler("logit_normal", 1.0, 3.0).timestep(0.3, 1024) == shift_by_factor(plain, 3.0)
    by_size = TimestepSampler("logit_normal", 1.0, ResolutionShift())
    assert by_size.timestep(0.3, 1024) == shift_by_factor(plain, ResolutionShift().factor(1024))
    assert by_size.timestep(0.3, 4096) > by_size.timestep(0.3, 1024)
