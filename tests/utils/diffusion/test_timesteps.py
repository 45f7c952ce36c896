"""The distributions of noise levels against diffusers and against their definitions."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from statistics import NormalDist

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from diffusers.training_utils import compute_density_for_timestep_sampling

from utils.diffusion.timesteps import (
    METHODS,
    RESOLUTION_SHIFTS,
    ResolutionShift,
    TimestepSampler,
    shift_by_factor,
)

QUANTILES = [(n + 0.5) / 2000 for n in range(2000)]
FEWER = QUANTILES[::4]
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
    TimestepSampler(method, 1.0, shift, min_t=low, max_t=high)
    for method in METHODS
    for shift in (None, 3.0, ResolutionShift())
    for low, high in ((0.0, 1.0), (0.3, 1.0), (0.1, 0.9))
]


@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
def test_levels_rise_with_the_quantile_and_stay_inside(sampler: TimestepSampler) -> None:
    levels = [sampler.timestep(u, tokens=1024) for u in (0.0, *FEWER, 1.0)]
    assert all(low < high for low, high in zip(levels, levels[1:], strict=False))
    assert 0.0 < levels[0] and levels[-1] < 1.0
    assert sampler.min_t <= levels[0] and levels[-1] <= sampler.max_t


@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
def test_between_two_levels_is_the_integral_of_the_density(sampler: TimestepSampler) -> None:
    """By Gauss' quadrature; with a shift and limits too."""
    nodes, weights = np.polynomial.legendre.leggauss(100)
    quantiles = (0.01, 0.2, 0.5, 0.7, 0.99)
    for low, high in pairwise(quantiles):
        start, end = (sampler.timestep(u, tokens=1024) for u in (low, high))
        points = start + 0.5 * (end - start) * (nodes + 1)
        share = 0.5 * (end - start) * np.dot(weights, [sampler.density(t, 1024) for t in points])
        assert share == pytest.approx(high - low, abs=1e-8)


@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
def test_quantile_is_the_inverse(sampler: TimestepSampler) -> None:
    for u in QUANTILES[::100]:
        assert sampler.quantile(sampler.timestep(u, 1024), 1024) == pytest.approx(u, abs=1e-9)


@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
def test_limits_cut_the_distribution_and_leave_its_shape(sampler: TimestepSampler) -> None:
    """As if every draw outside the limits were drawn anew."""
    unlimited = replace(sampler, min_t=0.0, max_t=1.0)
    inside = [t for t in (unlimited.timestep(u, 1024) for u in FEWER) if sampler.min_t <= t <= sampler.max_t]
    np.testing.assert_allclose(
        np.quantile(inside, (0.1, 0.5, 0.9)), [sampler.timestep(u, 1024) for u in (0.1, 0.5, 0.9)], atol=0.004
    )
    for t in (0.05, 0.2, 0.5, 0.95):
        is_inside = sampler.min_t <= t <= sampler.max_t
        assert (sampler.density(t, 1024) > 0.0) == is_inside


def test_limits_hold_after_the_shift() -> None:
    sampler = TimestepSampler("uniform", shift=5.0, min_t=0.2, max_t=0.4)
    assert sampler.timestep(0.0, 1) == pytest.approx(0.2, rel=1e-12)
    assert sampler.timestep(1.0, 1) == pytest.approx(0.4, rel=1e-12)


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"shift": -3.0}, "shift must be above 0"),
        ({"shift": 0.0}, "shift must be above 0"),
        ({"min_t": 0.5, "max_t": 0.5}, "min_t < max_t"),
        ({"min_t": 0.7, "max_t": 0.2}, "min_t < max_t"),
        ({"min_t": -0.1}, "min_t < max_t"),
        ({"max_t": 1.1}, "min_t < max_t"),
        ({"method": "normal"}, "logit_normal, uniform"),
        ({"sigmoid_scale": 0.0}, "sigmoid_scale"),
        ({"method": "mode", "mode_scale": 2.0}, "mode_scale"),
        ({"sigmoid_scale": 0.1, "min_t": 0.9}, "never draws"),
        ({"sigmoid_scale": 0.1, "max_t": 0.1, "shift": ResolutionShift()}, "never draws"),
    ],
)
def test_wrong_values_are_refused(wrong: dict, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        TimestepSampler(**wrong)


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("flux", (256, 0.5), (4096, 1.15)),
        ("qwen", (256, 0.5), (8192, 0.9)),
        ("ltx", (1024, 0.95), (4096, 2.05)),
        ("krea2", (256, 0.5), (6400, 1.15)),
    ],
)
def test_published_shifts(name: str, low: tuple, high: tuple) -> None:
    for tokens, mu in (low, high):
        assert RESOLUTION_SHIFTS[name].factor(tokens) == pytest.approx(math.exp(mu), rel=1e-12)


def test_shift_comes_after_the_distribution() -> None:
    plain = TimestepSampler("logit_normal", 1.0).timestep(0.3, tokens=1024)
    assert TimestepSampler("logit_normal", 1.0, 3.0).timestep(0.3, 1024) == shift_by_factor(plain, 3.0)
    by_size = TimestepSampler("logit_normal", 1.0, ResolutionShift())
    assert by_size.timestep(0.3, 1024) == shift_by_factor(plain, ResolutionShift().factor(1024))
    assert by_size.timestep(0.3, 4096) > by_size.timestep(0.3, 1024)
