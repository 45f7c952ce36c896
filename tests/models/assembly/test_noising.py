"""Micro-batches: noised as the objective says, by draws that depend on the sample and not on its company."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from models.assembly.noising import Noising
from models.flux import FluxPipeline, unpack
from tests.models import tiny_flux, tiny_ltx_video
from utils.dataset.batches import FeatureBatch
from utils.dataset.epochs import Positions
from utils.dataset.samples import Bucket
from utils.diffusion import strata
from utils.diffusion.seeds import normal
from utils.diffusion.timesteps import ResolutionShift, TimestepSampler

SHAPE = (4, 4, 6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_flux.write_folder(tmp_path_factory.mktemp("flux"))


def batch(*samples: str) -> FeatureBatch:
    shapes = {"latents": SHAPE, "t5": (16, 64), "clip_pooled": (32,)}
    return FeatureBatch(
        {name: torch.stack([normal(shape, 0, name, sample) for sample in samples]) for name, shape in shapes.items()},
        list(samples),
        Bucket(48, 32, 1),
        torch.ones(len(samples), 1, 1, 1),
    )


def flux(folder: Path, seed: int = 0, **options: Any) -> FluxPipeline:
    return FluxPipeline(tiny_flux.pipeline(folder, **options).options, seed)


def noised(inputs: Any) -> torch.Tensor:
    return unpack(inputs.x_BTC, *SHAPE[1:])


def test_inputs_and_target_are_of_one_noise(folder: Path) -> None:
    given = batch("a", "b", "c")
    inputs, labels, _ = Noising(flux(folder)).training(given, epoch=2)
    t = inputs.t_B.view(-1, 1, 1, 1)
    torch.testing.assert_close(noised(inputs), given.features["latents"] + t * labels.target, rtol=1e-5, atol=1e-5)
    assert len(set(inputs.t_B.tolist())) == 3
    assert torch.equal(labels.weight, given.weight)
    quantile_B, share_B = labels.levels
    levels = [flux(folder).maths.timesteps.timestep(quantile, 6) for quantile in quantile_B.tolist()]
    torch.testing.assert_close(inputs.t_B, torch.tensor(levels))
    assert share_B.tolist() == [1.0, 1.0, 1.0]


def test_a_stage_is_given_what_it_uses(folder: Path) -> None:
    inputs, labels, _ = Noising(flux(folder)).training(batch("a"), epoch=2)
    first, nothing, _ = Noising(flux(folder), wants_labels=False).training(batch("a"), epoch=2)
    none, last, _ = Noising(flux(folder), wants_inputs=False).training(batch("a"), epoch=2)
    assert nothing is None and torch.equal(first.x_BTC, inputs.x_BTC)
    assert none is None and torch.equal(last.target, labels.target)


def test_of_a_distribution_of_latents_one_is_drawn_each_epoch(folder: Path) -> None:
    """x_t - t * target is the clean latent: over many epochs it has the mean and the spread of the distribution."""
    given = batch("a", "b")
    mean = given.features.pop("latents")
    given.features.update(latents_mean=mean, latents_std=torch.full_like(mean, 0.5))
    drawn = []
    for epoch in range(200):
        inputs, labels, _ = Noising(flux(folder)).training(given, epoch)
        drawn.append(noised(inputs) - inputs.t_B.view(-1, 1, 1, 1) * labels.target)
    drawn = torch.stack(drawn)
    torch.testing.assert_close(drawn.mean(0), mean, atol=0.2, rtol=0)
    assert drawn.std(0).mean().item() == pytest.approx(0.5, rel=0.02)


def test_a_sample_is_noised_alike_in_any_company(folder: Path) -> None:
    inputs, labels, _ = Noising(flux(folder)).training(batch("a", "b", "c"), epoch=2)
    for index, sample in enumerate("abc"):
        alone, its_labels, _ = Noising(flux(folder)).training(batch(sample), epoch=2)
        assert torch.equal(alone.x_BTC[0], inputs.x_BTC[index])
        assert torch.equal(its_labels.target[0], labels.target[index])


def test_another_epoch_or_seed_draws_anew(folder: Path) -> None:
    inputs, labels, _ = Noising(flux(folder)).training(batch("a"), epoch=2)
    for seed, epoch in ((0, 3), (1, 2)):
        others, other_labels, _ = Noising(flux(folder, seed)).training(batch("a"), epoch)
        assert others.t_B.item() != inputs.t_B.item()
        assert (other_labels.target - labels.target).abs().mean() > 0.1


def test_evaluation_is_the_same_in_every_run(folder: Path) -> None:
    first, labels, _ = Noising(flux(folder, seed=1)).evaluation(batch("a", "b"), "held out", 0.3)
    again, other_labels, _ = Noising(flux(folder, seed=2)).evaluation(batch("b"), "held out", 0.3)
    assert torch.equal(first.x_BTC[1], again.x_BTC[0]) and torch.equal(labels.target[1], other_labels.target[0])
    another_set, _, _ = Noising(flux(folder)).evaluation(batch("b"), "other", 0.3)
    assert not torch.equal(another_set.x_BTC, again.x_BTC)


@pytest.fixture(scope="module")
def ltx_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_ltx_video.write_folder(tmp_path_factory.mktemp("ltx_video"))


def of_clips(*samples: str) -> FeatureBatch:
    clean = torch.stack([normal((4, 3, 4, 6), 0, "latents", sample) for sample in samples])
    text = tiny_ltx_video.ragged("t5", (5,) * len(samples), tiny_ltx_video.TEXT_WIDTH)
    weight = torch.ones(len(samples), 1, 1, 1, 1)
    return FeatureBatch({"latents": clean, **text}, list(samples), Bucket(48, 32, 5), weight)


def test_frames_are_given_by_a_draw_for_each_sample(ltx_folder: Path) -> None:
    """The first stage gives those that the last does not count, in any company; about as many as asked."""
    names = [f"sample {number}" for number in range(60)]
    batch = of_clips(*names)
    ltx = tiny_ltx_video.pipeline(ltx_folder, first_frame_share=0.3)
    inputs = Noising(ltx, wants_labels=False).training(batch, epoch=2).inputs
    weight = Noising(ltx, wants_inputs=False).training(batch, epoch=2).labels.weight
    assert weight.shape == (60, 1, 3, 1, 1)
    is_given = weight[:, 0, 0, 0, 0] == 0
    assert 10 <= is_given.sum() <= 26
    assert torch.equal(is_given, inputs.t_BR[:, 0] == 0) and not (inputs.t_BR[:, 1:] == 0).any()
    first_BTC = batch.features["latents"][:, :, 0].flatten(2).transpose(1, 2)
    assert torch.equal((inputs.x_BTC[:, : 4 * 6] == first_BTC).all(2).all(1), is_given)
    torch.testing.assert_close(weight.mean(dim=(1, 2, 3, 4)), torch.ones(60))
    number = is_given.int().argmax().item()
    alone = Noising(ltx).training(of_clips(names[number]), epoch=2)
    assert torch.equal(alone.labels.weight[0], weight[number])
    assert Noising(ltx).training(of_clips(names[(~is_given).int().argmax()]), epoch=2).inputs.t_BR.shape == (1, 1)


def test_evaluation_gives_the_same_frames_in_every_run_at_every_noise_level(ltx_folder: Path) -> None:
    names = [f"sample {number}" for number in range(20)]
    weights = []
    for seed, quantile in ((1, 0.2), (2, 0.2), (2, 0.7)):
        ltx = tiny_ltx_video.pipeline(ltx_folder, first_frame_share=0.5)
        ltx.seed = seed
        weights.append(Noising(ltx).evaluation(of_clips(*names), "held out", quantile).labels.weight)
    assert torch.equal(weights[0], weights[1]) and torch.equal(weights[1], weights[2])
    assert 0 < (weights[0] == 0).sum() < 20


OPTIONS = [
    ({}, TimestepSampler("logit_normal", 1.0, None)),
    ({"timestep_sample_method": "uniform", "shift": 3.0}, TimestepSampler("uniform", 1.0, 3.0)),
    ({"sigmoid_scale": 2.0, "flux_shift": True}, TimestepSampler("logit_normal", 2.0, ResolutionShift())),
]


@pytest.mark.parametrize(("options", "sampler"), OPTIONS)
def test_levels_are_those_the_options_ask_for(folder: Path, options: dict, sampler: TimestepSampler) -> None:
    inputs, _, _ = Noising(flux(folder, **options)).evaluation(batch("a", "b"), "held out", 0.3)
    assert inputs.t_B.dtype == torch.float32
    assert inputs.t_B.tolist() == pytest.approx([sampler.timestep(0.3, tokens=6)] * 2)


def noise_of(labels: Any, given: FeatureBatch) -> torch.Tensor:
    """The noise that a target of flow matching asks for."""
    return labels.target + given.features["latents"]


def test_noise_is_made_as_the_options_ask(folder: Path) -> None:
    given = batch("a", "b")
    plain = noise_of(Noising(flux(folder)).training(given, epoch=2)[1], given)
    added = noise_of(Noising(flux(folder, noise_offset=0.5)).training(given, epoch=2)[1], given) - plain
    torch.testing.assert_close(added, added[:, :, :1, :1].expand_as(added), rtol=0, atol=1e-6)
    assert added[:, :, 0, 0].unique().numel() == 8
    pyramid = noise_of(Noising(flux(folder, multires_noise_iterations=4)).training(given, epoch=2)[1], given)
    torch.testing.assert_close(pyramid.std((1, 2, 3)), torch.ones(2), rtol=1e-5, atol=0)
    assert (pyramid - plain).abs().mean() > 0.05


def test_perturbation_is_seen_and_not_asked_for(folder: Path) -> None:
    given = batch(*"abcdefgh")
    inputs, labels, _ = Noising(flux(folder)).training(given, epoch=2)
    seen, asked, _ = Noising(flux(folder, ip_noise_gamma=0.3)).training(given, epoch=2)
    assert torch.equal(asked.target, labels.target) and torch.equal(seen.t_B, inputs.t_B)
    further = (noised(seen) - noised(inputs)) / seen.t_B.view(-1, 1, 1, 1)
    assert further.std().item() == pytest.approx(0.3, rel=0.1)
    assert abs((further * noise_of(labels, given)).mean().item()) < 0.05


def test_weights_and_widths_follow_the_noise_level(folder: Path) -> None:
    given = batch("a", "b")
    given.weight.mul_(torch.tensor([1.0, 0.5]).view(-1, 1, 1, 1))
    inputs, labels, _ = Noising(flux(folder, weighting_scheme="sigma_sqrt", loss_type="huber")).training(given, epoch=2)
    t = inputs.t_B.view(-1, 1, 1, 1)
    torch.testing.assert_close(labels.weight, given.weight / t**2)
    torch.testing.assert_close(labels.delta, 0.9 * (1 - t) ** 2 + 0.1)


def test_evaluation_measures_the_runs_distance_without_the_extras_of_training(folder: Path) -> None:
    given = batch("a", "b")
    extras = {"noise_offset": 0.5, "ip_noise_gamma": 0.3, "weighting_scheme": "cosmap", "stratified_timesteps": "epoch"}
    plain_inputs, plain, _ = Noising(flux(folder)).evaluation(given, "held out", 0.3)
    inputs, labels, _ = Noising(flux(folder, **extras, loss_type="mae")).evaluation(given, "held out", 0.3)
    assert torch.equal(inputs.x_BTC, plain_inputs.x_BTC) and torch.equal(labels.target, plain.target)
    assert torch.equal(labels.weight, given.weight) and labels.delta is None
    prediction = torch.zeros_like(labels.target)
    losses_B = flux(folder, loss_type="mae").maths.loss(prediction, labels)
    torch.testing.assert_close(losses_B, labels.target.abs().mean((1, 2, 3)))


def test_stratified_timesteps_are_drawn_in_parts_of_their_own(folder: Path) -> None:
    sampler = TimestepSampler()
    for method, count, taken in (("batch", 8, [4, 5, 6, 7]), ("epoch", 100, [3, 30, 99, 7])):
        given = replace(batch("a", "b", "c", "d"), positions=Positions(5, range(4, 8), 8, [3, 30, 99, 7], 100))
        inputs, _, _ = Noising(flux(folder, stratified_timesteps=method)).training(given, epoch=2)
        quantile = {
            "batch": lambda position, n: strata.in_batch(0, 2, 5, position, n),
            "epoch": lambda position, n: strata.in_epoch(0, 2, position, n),
        }[method]
        assert inputs.t_B.tolist() == pytest.approx([sampler.timestep(quantile(p, count), 6) for p in taken])
        parts = [int(sampler.quantile(t, 6) * count) for t in inputs.t_B.tolist()]
        assert len(set(parts)) == 4
