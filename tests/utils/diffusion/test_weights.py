"""Weights of the loss against diffusers and the published formulas."""

from __future__ import annotations

import math
import re

import pytest
import torch
from diffusers.training_utils import compute_loss_weighting_for_sd3

from utils.diffusion.checks import DEMANDS, TITLES, refusals
from utils.diffusion.objectives import EDM, Epsilon, FlowMatching, Objective, VPrediction
from utils.diffusion.schedules import NoiseSchedule
from utils.diffusion.weights import FLOW_WEIGHTINGS, LossWeighting

STEPS = (0, 100, 500, 999)
LEVELS = torch.tensor(STEPS) / 1000


def snr_of(step: int) -> float:
    abar = NoiseSchedule().abar_N[step].item()
    return abar / (1 - abar)


def weights_of(weighting: LossWeighting, objective: Objective) -> list[float]:
    return weighting.weight(objective, LEVELS).tolist()


@pytest.mark.parametrize("name", FLOW_WEIGHTINGS)
def test_of_flow_matching_are_those_of_diffusers(name: str) -> None:
    sigmas = torch.tensor([0.01, 0.3, 0.5, 0.99])
    ours = LossWeighting(name).weight(FlowMatching(), sigmas)
    torch.testing.assert_close(ours, compute_loss_weighting_for_sd3(name, sigmas))


@pytest.mark.parametrize(
    ("options", "epsilon", "v"),
    [
        ({}, lambda snr: 1.0, lambda snr: 1.0),
        ({"min_snr_gamma": 5.0}, lambda snr: min(snr, 5) / snr, lambda snr: min(snr, 5) / (snr + 1)),
        ({"soft_min_snr_gamma": 5.0}, lambda snr: 5 / (snr + 5), lambda snr: snr * 5 / (snr + 5) / (snr + 1)),
        (
            {"debiased_estimation_loss": True},
            lambda snr: 1 / math.sqrt(min(snr, 1000)),
            lambda snr: 1 / (min(snr, 1000) + 1),
        ),
        ({"scale_v_pred_loss_like_noise_pred": True}, None, lambda snr: min(snr, 1000) / (min(snr, 1000) + 1)),
        ({"v_pred_like_loss": 0.3}, lambda snr: 1 + 0.3 * (min(snr, 1000) + 1) / min(snr, 1000), None),
        (
            {"min_snr_gamma": 2.0, "debiased_estimation_loss": True},
            lambda snr: min(snr, 2) / snr / math.sqrt(min(snr, 1000)),
            lambda snr: min(snr, 2) / (snr + 1) / (min(snr, 1000) + 1),
        ),
    ],
    ids=lambda value: None if callable(value) else str(value),
)
def test_of_ddpm_are_the_formulas(options: dict, epsilon, v) -> None:
    for objective, formula in ((Epsilon(), epsilon), (VPrediction(), v)):
        if formula is not None:
            expected = [formula(snr_of(step)) for step in STEPS]
            assert weights_of(LossWeighting(**options), objective) == pytest.approx(expected, rel=1e-5)
            assert not refusals(options, objective.kind)


def test_min_snr_is_one_weight_on_the_picture() -> None:
    """Whatever is predicted, the error of x_0 that follows from it counts min(SNR, gamma)."""
    schedule, weighting = NoiseSchedule(), LossWeighting(min_snr_gamma=5.0)
    snr, t_B = snr_of(500), LEVELS[2:3]
    for objective in (Epsilon(schedule), VPrediction(schedule)):
        clean, noise = torch.zeros(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
        x_t, target = objective.noised(clean, noise, t_B), objective.target(clean, noise, t_B)
        error = objective.clean_of(target + 0.01, x_t, t_B) - clean
        weighted = weighting.weight(objective, t_B).double() * 0.01**2
        assert weighted.item() == pytest.approx(min(snr, 5) * error.item() ** 2, rel=1e-5)


def test_v_weighted_like_noise_is_the_loss_of_the_noise() -> None:
    """For a v that is off by d, the noise that follows from it is off by sqrt(abar) d."""
    abar = NoiseSchedule().abar_N[500].item()
    weight = LossWeighting(scale_v_pred_loss_like_noise_pred=True).weight(VPrediction(), LEVELS)[2].item()
    assert weight == pytest.approx(abar, rel=1e-5)


def test_weights_are_finite_with_zero_terminal_snr() -> None:
    objective = VPrediction(NoiseSchedule(zero_terminal_snr=True))
    for options in ({"min_snr_gamma": 5.0}, {"soft_min_snr_gamma": 5.0}, {"debiased_estimation_loss": True}):
        assert LossWeighting(**options).weight(objective, LEVELS).isfinite().all()


@pytest.mark.parametrize(
    ("option", "objective", "reason"),
    [
        ("min_snr_gamma", FlowMatching(), "needs noise prediction .* flow matching"),
        ("soft_min_snr_gamma", EDM(), "EDM"),
        ("debiased_estimation_loss", FlowMatching(), "DDPM's steps"),
        ("scale_v_pred_loss_like_noise_pred", Epsilon(), "needs v-prediction"),
        ("v_pred_like_loss", VPrediction(), "needs noise prediction"),
        ("weighting_scheme", Epsilon(), "sigma of flow matching"),
        ("shift", VPrediction(), "needs flow matching or EDM"),
        ("log_snr", Epsilon(), "needs flow matching or EDM"),
        ("rescale_betas_zero_snr", Epsilon(), "needs some picture left"),
    ],
    ids=str,
)
def test_what_an_objective_cannot_honour_is_refused(option: str, objective: Objective, reason: str) -> None:
    refused = refusals([option, "unheard_of"], objective.kind)
    assert refused.keys() == {option}
    assert re.search(reason, refused[option])


def test_every_demand_can_be_met_and_is_not_met_by_all() -> None:
    for name, demand in DEMANDS.items():
        assert not refusals([name], demand.kinds[0])
        assert set(demand.kinds) < set(TITLES)


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"min_snr_gamma": 0.0}, "min_snr_gamma must be above 0"),
        ({"min_snr_gamma": 5.0, "soft_min_snr_gamma": 5.0}, "leave one out"),
        ({"v_pred_like_loss": -1.0}, "v_pred_like_loss"),
        ({"weighting_scheme": "cosine"}, "sigma_sqrt"),
    ],
)
def test_wrong_values_are_refused(wrong: dict, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        LossWeighting(**wrong)
