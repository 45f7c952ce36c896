"""Micro-batches: noised as the objective says, by draws that depend on the sample and not on its company."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from models.flux import FluxPipeline, unpack
from models.foundation.noising import evaluation_micro_batch, training_micro_batch
from tests.models import tiny_flux
from utils.dataset.batches import FeatureBatch
from utils.dataset.buckets import Bucket
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
    )


def flux(folder: Path, seed: int = 0, **options: Any) -> FluxPipeline:
    return FluxPipeline(tiny_flux.pipeline(folder, **options).options, seed)


def noised(inputs: Any) -> torch.Tensor:
    return unpack(inputs.x_BTC, *SHAPE[1:])


def test_inputs_and_target_are_of_one_noise(folder: Path) -> None:
    given = batch("a", "b", "c")
    inputs, labels = training_micro_batch(flux(folder), given, epoch=2)
    t = inputs.t_B.view(-1, 1, 1, 1)
    torch.testing.assert_close(noised(inputs), given.features["latents"] + t * labels.target, rtol=1e-5, atol=1e-5)
    assert len(set(inputs.t_B.tolist())) == 3
    assert labels.weight_B.tolist() == [1.0] * 3


def test_a_sample_is_noised_alike_in_any_company(folder: Path) -> None:
    inputs, labels = training_micro_batch(flux(folder), batch("a", "b", "c"), epoch=2)
    for index, sample in enumerate("abc"):
        alone, its_labels = training_micro_batch(flux(folder), batch(sample), epoch=2)
        assert torch.equal(alone.x_BTC[0], inputs.x_BTC[index])
        assert torch.equal(its_labels.target[0], labels.target[index])


def test_another_epoch_or_seed_draws_anew(folder: Path) -> None:
    inputs, labels = training_micro_batch(flux(folder), batch("a"), epoch=2)
    for seed, epoch in ((0, 3), (1, 2)):
        others, other_labels = training_micro_batch(flux(folder, seed), batch("a"), epoch)
        assert others.t_B.item() != inputs.t_B.item()
        assert (other_labels.target - labels.target).abs().mean() > 0.1


def test_evaluation_is_the_same_in_every_run(folder: Path) -> None:
    first, labels = evaluation_micro_batch(flux(folder, seed=1), batch("a", "b"), "held out", 0.3)
    again, other_labels = evaluation_micro_batch(flux(folder, seed=2), batch("b"), "held out", 0.3)
    assert torch.equal(first.x_BTC[1], again.x_BTC[0]) and torch.equal(labels.target[1], other_labels.target[0])
    another_set, _ = evaluation_micro_batch(flux(folder), batch("b"), "other", 0.3)
    assert not torch.equal(another_set.x_BTC, again.x_BTC)


OPTIONS = [
    ({}, TimestepSampler("logit_normal", 1.0, None)),
    ({"timestep_sample_method": "uniform", "shift": 3.0}, TimestepSampler("uniform", 1.0, 3.0)),
    ({"sigmoid_scale": 2.0, "flux_shift": True}, TimestepSampler("logit_normal", 2.0, ResolutionShift())),
]


@pytest.mark.parametrize(("options", "sampler"), OPTIONS)
def test_levels_are_those_the_options_ask_for(folder: Path, options: dict, sampler: TimestepSampler) -> None:
    inputs, _ = evaluation_micro_batch(flux(folder, **options), batch("a", "b"), "held out", 0.3)
    assert inputs.t_B.dtype == torch.float32
    assert inputs.t_B.tolist() == pytest.approx([sampler.timestep(0.3, tokens=6)] * 2)
