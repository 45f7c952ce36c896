"""Quantile functions, distribution functions and densities against one another, integrals, and diffusers."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers.training_utils import compute_density_for_timestep_sampling

from utils.diffusion.distributions import (
    Beta,
    CosMap,
    Distribution,
    LogitNormal,
    Mode,
    Uniform,
    log_snr_normal,
)
from utils.diffusion.incomplete_beta import regularised_incomplete_beta

DISTRIBUTIONS = [
    Uniform(),
    LogitNormal(),
    LogitNormal(-0.7, 1.5),
    Mode(1.29),
    Mode(-0.8),
    CosMap(),
    Beta(2.0, 2.0),
    Beta(0.6, 3.5),
    log_snr_normal(1.0, 3.0),
]
QUANTILES = [0.001, 0.05, 0.3, 0.5, 0.6, 0.95, 0.999]


def integral(function, low: float, high: float) -> float:
    nodes, weights = np.polynomial.legendre.leggauss(200)
    points = low + 0.5 * (high - low) * (nodes + 1.0)
    return 0.5 * (high - low) * float(np.dot(weights, [function(point) for point in points]))


@pytest.mark.parametrize("distribution", DISTRIBUTIONS, ids=str)
def test_between_two_quantiles_is_the_integral_of_the_density(distribution: Distribution) -> None:
    for low, high in pairwise(QUANTILES):
        share = integral(distribution.density, distribution.quantile(low), distribution.quantile(high))
        assert share == pytest.approx(high - low, abs=1e-9)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS, ids=str)
def test_the_distribution_function_is_the_inverse_of_the_quantile_function(distribution: Distribution) -> None:
    for u in QUANTILES:
        assert distribution.cumulative(distribution.quantile(u)) == pytest.approx(u, rel=1e-12)
    assert distribution.cumulative(0.0) == pytest.approx(0.0, abs=1e-20)
    assert distribution.cumulative(1.0) == pytest.approx(1.0, abs=1e-15)


@pytest.mark.parametrize("scale", [-1.0, -0.5, 0.81, 1.29, 2 / (math.pi - 2)])
def test_mode_rises_up_to_the_bounds_of_its_scale(scale: float) -> None:
    levels = [Mode(scale).quantile(n / 1000) for n in range(1001)]
    assert all(low < high for low, high in pairwise(levels))
    assert (levels[0], levels[-1]) == pytest.approx((0.0, 1.0), abs=1e-12)


@pytest.mark.parametrize("scale", [-1.01, 2 / (math.pi - 2) + 0.01])
def test_beyond_them_mode_turns_back_and_is_refused(scale: float) -> None:
    turning = [u - scale * (math.sin(math.pi * u / 2) ** 2 - u) for u in (n / 1000 for n in range(1001))]
    assert any(low > high for low, high in pairwise(turning))
    with pytest.raises(ValueError, match="mode_scale"):
        Mode(scale)


def test_mode_is_that_of_diffusers() -> None:
    torch.manual_seed(0)
    sample = compute_density_for_timestep_sampling("mode", 200_000, mode_scale=1.29)
    levels = [Mode(1.29).quantile(u) for u in QUANTILES]
    np.testing.assert_allclose(np.quantile(sample.numpy(), QUANTILES), levels, atol=0.005)


def test_cosmap_is_the_published_map() -> None:
    for u in QUANTILES:
        assert CosMap().quantile(u) == pytest.approx(1 - 1 / (math.tan(math.pi * u / 2) + 1), rel=1e-14)


def test_log_snr_is_normal() -> None:
    """Of x_t = (1 - t) x_0 + t n the ratio is ((1 - t) / t)^2, which falls as t rises."""
    log_snrs = [2 * math.log((1 - t) / t) for t in (log_snr_normal(1.0, 3.0).quantile(u) for u in QUANTILES)]
    normal = torch.distributions.Normal(1.0, 3.0).icdf(1 - torch.tensor(QUANTILES, dtype=torch.float64))
    np.testing.assert_allclose(log_snrs, normal.numpy(), rtol=1e-9)


@pytest.mark.parametrize(("a", "b"), [(1, 1), (2, 3), (7, 2), (30, 40)])
def test_incomplete_beta_is_the_binomial_sum(a: int, b: int) -> None:
    for x in (0.01, 0.2, 0.5, 0.77, 0.99):
        trials = a + b - 1
        exact = math.fsum(math.comb(trials, j) * x**j * (1 - x) ** (trials - j) for j in range(a, trials + 1))
        assert regularised_incomplete_beta(x, a, b) == pytest.approx(exact, rel=1e-12)


@pytest.mark.parametrize(("a", "b"), [(0.3, 0.8), (0.5, 4.2), (1.7, 0.6), (3.3, 2.9), (150.5, 80.25)])
def test_incomplete_beta_is_the_integral(a: float, b: float) -> None:
    """For a small a over s = t^(a / 3), which takes the pole at 0 away."""
    power = min(1.0, a / 3.0)
    norm = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)) / power
    for x in (0.05, 0.3, 0.66, 0.9):
        pieces = np.linspace(0.0, x**power, 9)

        def integrand(s: float) -> float:
            return s ** (a / power - 1) * (1 - s ** (1 / power)) ** (b - 1)

        numeric = sum(integral(integrand, *pair) for pair in pairwise(pieces))
        assert regularised_incomplete_beta(x, a, b) == pytest.approx(norm * numeric, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("wrong", [lambda: LogitNormal(0.0, 0.0), lambda: Beta(0.0, 1.0), lambda: Beta(1.0, -1.0)])
def test_widths_must_be_positive(wrong) -> None:
    with pytest.raises(ValueError, match="above 0"):
        wrong()


def test_far_out_normal_numbers_do_not_overflow() -> None:
    assert LogitNormal(0.0, 1000.0).quantile(1e-6) == 0.0
    assert LogitNormal(0.0, 1000.0).quantile(1 - 1e-6) == 1.0
