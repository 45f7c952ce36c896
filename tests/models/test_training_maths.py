"""What `[model]` says of timesteps, noise and loss reaches training: through a real pipeline, against float64.

Shapes: B batch, C latent channels, h w latent cells.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from diffusers import DDPMScheduler
from torch import nn

from models.assembly.noising import QUANTILES, Noising
from models.assembly.preflight import check_training
from models.families.ddpm import scheduler_config
from models.flux import FluxPipeline
from tests.models import tiny_flux, tiny_sdxl
from utils.dataset.batches import FeatureBatch
from utils.dataset.samples import Bucket
from utils.diffusion.losses import LOSSES, SCHEDULES, Labels, Loss
from utils.diffusion.noise import NoiseOptions
from utils.diffusion.objectives import Epsilon, Objective, VPrediction
from utils.diffusion.seeds import normal
from utils.diffusion.timesteps import METHODS, TimestepSampler
from utils.diffusion.weights import FLOW_WEIGHTINGS, LossWeighting
from utils.errors import UserError
from utils.settings.model_schema import ModelSettings

DRAWS = ["a", "b"]
SHAPE = (4, 4, 6)
EPOCH = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_flux.write_folder(tmp_path_factory.mktemp("flux"))


def masked_batch() -> FeatureBatch:
    """Two samples, of which the second counts half as much and has a mask."""
    weight = torch.ones(2, 1, 4, 6)
    weight[1] = 0.5 * (normal((1, 4, 6), 0, "mask") > 0)
    shapes = {"latents": SHAPE, "t5": (tiny_flux.TEXT_TOKENS, 64), "clip_pooled": (32,)}
    features = {name: normal((2, *shape), 0, name) for name, shape in shapes.items()}
    return FeatureBatch(features, DRAWS, Bucket(48, 32, 1), weight)


def run(layers: list[nn.Module], stream: Any) -> torch.Tensor:
    for layer in layers:
        stream = layer(stream)
    return stream


def gradients(losses_B: torch.Tensor, denoiser: nn.Module) -> dict[str, torch.Tensor]:
    parameters = dict(denoiser.named_parameters())
    return dict(zip(parameters, torch.autograd.grad(losses_B.mean(), list(parameters.values())), strict=True))


def width(t: float, options: dict[str, Any]) -> float:
    c = options.get("huber_c", 0.1)
    follows = {"constant": c, "exponential": c**t, "snr": (1 - c) * (1 - t) ** 2 + c}
    return options.get("huber_scale", 1.0) * follows[options.get("huber_schedule", "snr")]


def distance(loss_type: str, error: torch.Tensor, d: float) -> torch.Tensor:
    size = error.abs()
    return {
        "mse": size**2,
        "mae": size,
        "huber": torch.where(size < d, size**2 / 2, d * (size - d / 2)),
        "smooth_l1": torch.where(size < d, size**2 / 2 / d, size - d / 2),
        "pseudo_huber": 2 * d * ((size**2 + d**2).sqrt() - d),
    }[loss_type]


def factor(weighting_scheme: str, t: float) -> float:
    return {"none": 1.0, "sigma_sqrt": t**-2, "cosmap": 2 / (math.pi * (1 - 2 * t + 2 * t**2))}[weighting_scheme]


CHOICES = [
    *({"loss_type": loss_type, "weighting_scheme": scheme} for loss_type in LOSSES for scheme in FLOW_WEIGHTINGS),
    {"loss_type": "huber", "huber_c": 0.5, "huber_schedule": "exponential", "huber_scale": 2.0},
    {"loss_type": "pseudo_huber", "huber_c": 0.3, "huber_schedule": "constant"},
]


@pytest.mark.parametrize("options", CHOICES, ids=lambda options: "-".join(map(str, options.values())))
def test_loss_and_gradients_of_flux_are_those_of_the_formulas_in_float64(folder: Path, options: dict[str, Any]) -> None:
    """Of all parameters, with a mask; noise, x_t, target, width and weight made anew."""
    flux, batch = tiny_flux.pipeline(folder, **options), masked_batch()
    denoiser = flux.weights.build()
    layers = flux.to_layers(denoiser)
    flux.weights.fill(denoiser, flux.weights.open(denoiser), layers)
    inputs, labels, _ = Noising(flux).training(batch, EPOCH)
    losses_B = flux.maths.loss(run(layers, inputs), labels)

    exact = copy.deepcopy(denoiser).double()
    clean, t_B = batch.features["latents"].double(), inputs.t_B.double()
    noise = torch.stack([normal(SHAPE, 0, "noise", EPOCH, name) for name in DRAWS]).double()
    t = t_B.view(-1, 1, 1, 1)
    prediction = run(
        flux.to_layers(exact), flux.prepare_inputs(batch.features, (1 - t) * clean + t * noise, inputs.t_B)
    )
    error, loss_type, scheme = prediction - (noise - clean), flux.options.loss_type, flux.options.weighting_scheme
    expected_B = torch.stack(
        [
            (distance(loss_type, one, width(level, options)) * weight).mean() * factor(scheme, level)
            for one, weight, level in zip(error, batch.weight.double(), t_B.tolist(), strict=True)
        ]
    )

    torch.testing.assert_close(losses_B.double(), expected_B, rtol=1e-5, atol=0)
    found, expected = gradients(losses_B, denoiser), gradients(expected_B, exact)
    for name, gradient in expected.items():
        tolerance = 1e-4 * gradient.abs().max().item()
        torch.testing.assert_close(found[name].double(), gradient, rtol=0, atol=tolerance, msg=name)


def ddpm_factor(options: dict[str, Any], snr: float, predicts_v: bool) -> float:
    """Hang et al. 2023; kohya's and diffusers' scripts weigh so."""
    over = snr + 1 if predicts_v else snr
    if gamma := options.get("min_snr_gamma"):
        return min(snr, gamma) / over
    if gamma := options.get("soft_min_snr_gamma"):
        return snr * gamma / (snr + gamma) / over
    if options.get("debiased_estimation_loss"):
        return 1 / (snr + 1) if predicts_v else snr**-0.5
    if options.get("scale_v_pred_loss_like_noise_pred"):
        return snr / (snr + 1)
    return 1 + options.get("v_pred_like_loss", 0.0) * (snr + 1) / snr


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"min_snr_gamma": 5.0},
        {"soft_min_snr_gamma": 5.0},
        {"debiased_estimation_loss": True},
        {"v_pred_like_loss": 0.3},
        {"prediction_type": "v_prediction", "min_snr_gamma": 5.0},
        {"prediction_type": "v_prediction", "scale_v_pred_loss_like_noise_pred": True},
        {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "min_snr_gamma": 5.0},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
def test_loss_and_gradients_of_sdxl_are_those_of_the_formulas_in_float64(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    """With the steps of diffusers' own scheduler."""
    sdxl = tiny_sdxl.pipeline(tiny_sdxl.write_folder(tmp_path), **options)
    check_training(sdxl)
    latents = normal((2, *sdxl.latent_shape(128, 64)), 0, "latents")
    features = {**tiny_sdxl.features((5, 11)), "latents": latents}
    denoiser = sdxl.weights.build()
    layers = sdxl.to_layers(denoiser)
    sdxl.weights.fill(denoiser, sdxl.weights.open(denoiser), layers)
    batch = FeatureBatch(features, DRAWS, Bucket(128, 64, 1), torch.ones(2, 1, 1, 1))
    inputs, labels, _ = Noising(sdxl).training(batch, EPOCH)
    losses_B = sdxl.maths.loss(run(layers, inputs), labels)

    scheduler = DDPMScheduler.from_config(scheduler_config(sdxl.options))
    steps_B, predicts_v = inputs.step_B, "prediction_type" in options
    noise = torch.stack([normal(latents.shape[1:], 0, "noise", EPOCH, name) for name in DRAWS]).double()
    abar = scheduler.alphas_cumprod[steps_B].double().view(-1, 1, 1, 1)
    clean, exact = latents.double(), copy.deepcopy(denoiser).double()
    x_t = abar.sqrt() * clean + (1 - abar).sqrt() * noise
    target = abar.sqrt() * noise - (1 - abar).sqrt() * clean if predicts_v else noise
    prediction = run(sdxl.to_layers(exact), inputs._replace(x_BChw=x_t))
    snr_B = (abar / (1 - abar)).flatten().tolist()
    factors_B = torch.tensor([ddpm_factor(options, snr, predicts_v) for snr in snr_B], dtype=torch.float64)
    expected_B = (prediction - target).square().mean((1, 2, 3)) * factors_B

    torch.testing.assert_close(losses_B.double(), expected_B, rtol=5e-5, atol=0)
    found, expected = gradients(losses_B, denoiser), gradients(expected_B, exact)
    for name, gradient in expected.items():
        # Biases before a group norm have no gradient but rounding.
        tolerance = 5e-4 * gradient.abs().max().item() + 1e-6
        torch.testing.assert_close(found[name].double(), gradient, rtol=0, atol=tolerance, msg=name)


def test_what_is_compared_is_for_the_objective_to_say(folder: Path) -> None:
    """Of an output with twice the channels the first half."""
    pipeline = with_objective(folder, Epsilon(learns_sigma=True))
    output, target = normal((2, 8, 4, 6), 0, "output"), normal((2, *SHAPE), 0, "target")
    losses_B = pipeline.maths.loss(output, Labels(target, torch.ones(2, 1, 1, 1)))
    torch.testing.assert_close(losses_B, (output[:, :4] - target).square().mean((1, 2, 3)))


def with_objective(folder: Path, objective: Objective, **options: Any) -> FluxPipeline:
    """A Flux that is trained to predict something else."""
    cls = type("Other", (FluxPipeline,), {"objective": objective})
    return cls(tiny_flux.pipeline(folder, **options).options)


def problems(pipeline: FluxPipeline) -> dict[str, str]:
    with pytest.raises(UserError) as raised:
        check_training(pipeline, "run.toml")
    assert {problem.file for problem in raised.value.problems} == {"run.toml"}
    return {problem.where: problem.message for problem in raised.value.problems}


def test_options_that_the_objective_cannot_honour_are_told_together(folder: Path) -> None:
    ddpm = {"min_snr_gamma": 5.0, "debiased_estimation_loss": True, "rescale_betas_zero_snr": True}
    told = problems(tiny_flux.pipeline(folder, **ddpm, noise_offset=0.1, multires_noise_iterations=6))
    assert told.keys() == {"[model]", *(f"[model] {key}" for key in ddpm)}
    assert "this model has flow matching" in told["[model] min_snr_gamma"]

    check_training(with_objective(folder, VPrediction(), **ddpm, noise_offset=0.1))
    flow = {"shift": 3.0, "weighting_scheme": "cosmap", "timestep_sample_method": "log_snr"}
    check_training(tiny_flux.pipeline(folder, **flow))
    places = {"shift", "weighting_scheme", 'timestep_sample_method = "log_snr"'}
    assert problems(with_objective(folder, VPrediction(), **flow)).keys() == {f"[model] {place}" for place in places}


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"noise_offset": 0.1, "multires_noise_iterations": 6}, "noise_offset and multires_noise_iterations"),
        ({"adaptive_noise_scale": 0.1}, "set noise_offset"),
        ({"min_t": 0.5, "max_t": 0.5}, "min_t and max_t"),
        ({"sigmoid_scale": 0.01, "min_t": 0.9}, "never draws"),
    ],
)
def test_contradictions_are_told(folder: Path, options: dict[str, Any], told: str) -> None:
    assert told in problems(tiny_flux.pipeline(folder, **options))["[model]"]


@pytest.mark.parametrize("cls", [TimestepSampler, LossWeighting, NoiseOptions, Loss])
def test_defaults_of_the_settings_are_those_of_the_maths(cls: type) -> None:
    renamed = {"method": "timestep_sample_method"}
    for field in dataclasses.fields(cls):
        assert ModelSettings.model_fields[renamed.get(field.name, field.name)].default == field.default, field.name


@pytest.mark.parametrize(
    ("key", "table"),
    [
        ("timestep_sample_method", METHODS),
        ("stratified_timesteps", QUANTILES),
        ("weighting_scheme", FLOW_WEIGHTINGS),
        ("loss_type", LOSSES),
        ("huber_schedule", SCHEDULES),
    ],
)
def test_choices_of_the_settings_are_those_of_the_maths(key: str, table: dict[str, Any]) -> None:
    assert set(get_args(ModelSettings.model_fields[key].annotation)) == table.keys()


V = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
SURPRISES = [
    ({"min_snr_gamma": 5.0}, {}),
    ({"min_snr_gamma": 5.0, "debiased_estimation_loss": True}, {"min_snr_gamma": ["multiplies with debiased"]}),
    ({**V, "debiased_estimation_loss": True}, {}),
    ({**V, "min_snr_gamma": 5.0}, {"min_snr_gamma": ["weighs the last step by 0"]}),
    (
        {**V, "min_snr_gamma": 5.0, "scale_v_pred_loss_like_noise_pred": True},
        {
            "min_snr_gamma": ["multiplies with scale_v_pred", "weighs the last step by 0"],
            "scale_v_pred_loss_like_noise_pred": ["weighs the last step by 0"],
        },
    ),
]


@pytest.mark.parametrize(("options", "told"), SURPRISES)
def test_weights_that_meet_are_told(tmp_path: Path, options: dict[str, Any], told: dict[str, list[str]]) -> None:
    sdxl = tiny_sdxl.pipeline(tiny_sdxl.write_folder(tmp_path), **options, text_encoder_1_lr=0.0, text_encoder_2_lr=0.0)
    found: dict[str, list[str]] = {}
    for option, remark in sdxl.remarks():
        found.setdefault(option, []).append(remark)
    assert found.keys() == told.keys()
    for option, words in told.items():
        assert all(word in said for word, said in zip(words, found[option], strict=True))
    # That what is told is so.
    last = sdxl.maths.weighting.weight(sdxl.objective, torch.tensor([0.999])).item()
    assert (last < 1e-6) == any("weighs the last step by 0" in said for lines in found.values() for said in lines)


def test_cosmap_twice_is_told() -> None:
    flux = tiny_flux.pipeline(tiny_flux.MINI_FLUX, weighting_scheme="cosmap", timestep_sample_method="cosmap")
    assert [option for option, _ in flux.remarks()] == ["weighting_scheme"]
    once = tiny_flux.pipeline(tiny_flux.MINI_FLUX, weighting_scheme="cosmap", timestep_sample_method="uniform")
    assert list(once.remarks()) == []
