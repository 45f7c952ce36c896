"""The variational term of models that learn the variance of a step (DiT, PixArt, HunyuanDiT).

Nichol and Dhariwal 2021 ("Improved denoising diffusion probabilistic models"), sections 3.1 and 2.1.
Shapes: B batch, C channels of the latent, `...` the rest of it. Step n is counted from 0; abar before step 0 is 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from utils.diffusion.losses import mean_of_samples
from utils.diffusion.objectives import Epsilon
from utils.diffusion.schedules import NoiseSchedule, over_sample

# The paper's code treats a clean value as one of 256 between -1 and 1, even if, as here, it is a latent.
HALF_BIN = 1.0 / 255.0
OUTERMOST_BIN = 0.999
SMALLEST_PROBABILITY = 1e-12


@dataclass(frozen=True)
class _Posterior:
    """q(x_{n-1} | x_n, x_0) of every step (N,), Ho et al. 2020, equations 6 and 7."""

    clean_factor_N: torch.Tensor
    noisy_factor_N: torch.Tensor
    log_variance_N: torch.Tensor
    log_beta_N: torch.Tensor


def _posterior(schedule: NoiseSchedule) -> _Posterior:
    abar_N = schedule.abar_N
    before_N = torch.cat([torch.ones_like(abar_N[:1]), abar_N[:-1]])
    alpha_N = abar_N / before_N
    beta_N = 1.0 - alpha_N
    variance_N = beta_N * (1.0 - before_N) / (1.0 - abar_N)
    return _Posterior(
        clean_factor_N=before_N.sqrt() * beta_N / (1.0 - abar_N),
        noisy_factor_N=alpha_N.sqrt() * (1.0 - before_N) / (1.0 - abar_N),
        # The variance of step 0 is 0; its logarithm is taken from the next, as the paper's code does.
        log_variance_N=torch.cat([variance_N[1:2], variance_N[1:]]).log(),
        log_beta_N=beta_N.log(),
    )


def variational_bound(
    output: torch.Tensor,
    clean: torch.Tensor,
    x_t: torch.Tensor,
    t_B: torch.Tensor,
    objective: Epsilon,
    weight: torch.Tensor | float = 1.0,
) -> torch.Tensor:
    """L_vlb of every sample (B,), in bits per value, in float32: of step n > 0 the divergence
    KL(q(x_{n-1} | x_n, x_0) || p(x_{n-1} | x_n)), of step 0 the negative logarithm of p(x_0 | x_1).

    With v the second half of the output, log(variance of p) = w log(beta) + (1 - w) log(posterior variance),
    w = (v + 1) / 2 (equation 15). The mean part gets no gradient from it: it belongs to the simple loss (section 3.1).
    Added to that loss with `hybrid_factor`.

    Args:
        output: (B, 2C, ...), of the denoiser.
        clean, x_t: (B, C, ...).
        t_B: noise levels in [0, 1].
        weight: factor on every value, (B, 1, ...), as that of `Labels`.
    """
    assert objective.learns_sigma, "the model has no variance to learn"
    output, clean, x_t = output.float(), clean.float(), x_t.float()
    mean_part, variance_part = output.chunk(2, dim=1)
    step_B, tables = objective.schedule.step(t_B), _posterior(objective.schedule)

    def at_step(table_N: torch.Tensor) -> torch.Tensor:
        return over_sample(table_N.float().to(clean.device)[step_B], clean)

    def posterior_mean(x_0: torch.Tensor) -> torch.Tensor:
        return at_step(tables.clean_factor_N) * x_0 + at_step(tables.noisy_factor_N) * x_t

    lowest, highest = at_step(tables.log_variance_N), at_step(tables.log_beta_N)
    share = (variance_part + 1.0) / 2.0
    log_variance = share * highest + (1.0 - share) * lowest
    mean = posterior_mean(objective.clean_of(mean_part.detach(), x_t, t_B))
    divergence = _normal_divergence(posterior_mean(clean), lowest, mean, log_variance)
    first = -_log_probability_of_bin(clean, mean, log_variance)
    per_value = torch.where(over_sample(step_B == 0, clean), first, divergence)
    return mean_of_samples(per_value * weight) / math.log(2.0)


def hybrid_factor(schedule: NoiseSchedule, scale: float = 0.001) -> float:
    """The factor on L_vlb at a random step in L_hybrid = L_simple + 0.001 L_vlb (equation 16), where L_vlb is the sum
    over all N steps: N times its mean."""
    return scale * schedule.steps


def _normal_divergence(
    mean: torch.Tensor, log_variance: torch.Tensor, other_mean: torch.Tensor, other_log_variance: torch.Tensor
) -> torch.Tensor:
    """KL between two normal distributions, per value, in nats."""
    ratio = (log_variance - other_log_variance).exp()
    distance = (mean - other_mean).square() * (-other_log_variance).exp()
    return 0.5 * (ratio + distance - 1.0 + other_log_variance - log_variance)


def _log_probability_of_bin(value: torch.Tensor, mean: torch.Tensor, log_variance: torch.Tensor) -> torch.Tensor:
    """The logarithm of the probability of the value's bin; the outermost bins reach to infinity (Ho et al. 2020,
    equation 13)."""
    deviation = (0.5 * log_variance).exp()
    upper = torch.special.ndtr((value - mean + HALF_BIN) / deviation)
    lower = torch.special.ndtr((value - mean - HALF_BIN) / deviation)
    upper = torch.where(value > OUTERMOST_BIN, 1.0, upper)
    lower = torch.where(value < -OUTERMOST_BIN, 0.0, lower)
    return (upper - lower).clamp(min=SMALLEST_PROBABILITY).log()
