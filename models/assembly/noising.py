"""Features -> a micro-batch: noise, noise level, noised latents, target. The same for every model.

Every number is a function of (seed, purpose, epoch or set, sample), so that the first and the last stage compute the
same numbers independently.

Shapes: B batch; latents (B, C, h, w) or (B, C, f, h, w), written (B, ...).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from models.base import BasePipeline, Features
from models.foundation.layers.given import loss_weights, weights_of_sections
from utils.dataset.batches import FeatureBatch
from utils.diffusion import seeds, strata
from utils.diffusion.losses import Labels
from utils.diffusion.noise import NoiseOptions, perturbed, sample_noise
from utils.diffusion.schedules import over_sample
from utils.diffusion.weights import LossWeighting


class NoisedBatch(NamedTuple):
    """A micro-batch of a step: inputs of the first stage, labels of the last stage, and the same inputs with empty
    captions for a teacher; None for what a stage does not need."""

    inputs: tuple | None
    labels: Labels | None
    empty: tuple | None = None


@dataclass(frozen=True)
class Draws:
    """The random draws of a micro-batch.

    Attributes:
        quantiles: the quantile of the noise level for each sample.
        noise, latents, given: names of the draws, which the names of the samples complete.
    """

    seed: int
    quantiles: Sequence[float]
    noise: tuple[object, ...]
    latents: tuple[object, ...]
    given: tuple[object, ...]


@dataclass(frozen=True)
class Noising:
    """Makes micro-batches for one stage.

    Attributes:
        wants_inputs: for the first stage, which takes the output of `prepare_inputs`.
        wants_labels: for the last stage, which compares its prediction with the target.
    """

    pipeline: BasePipeline
    wants_inputs: bool = True
    wants_labels: bool = True

    def training(self, batch: FeatureBatch, epoch: int) -> NoisedBatch:
        """Each sample with a noise level and with noise that are drawn for this epoch."""
        pipeline = self.pipeline
        quantiles = QUANTILES[pipeline.options.stratified_timesteps](pipeline.seed, epoch, batch)
        draws = Draws(pipeline.seed, quantiles, ("noise", epoch), ("latents", epoch), ("given frames", epoch))
        maths = pipeline.maths
        return self._noised(batch, draws, maths.noise, maths.weighting, with_variance=maths.variational_weight > 0)

    def evaluation(self, batch: FeatureBatch, set_name: str, quantile: float) -> NoisedBatch:
        """Each sample at the same quantile of the noise levels, with noise that depends only on (set, sample,
        quantile), not even on the run's seed, so that runs can be compared.

        The loss is the run's `loss_type` with plain noise and without weights by noise level: the options for noise
        only help training, and with weights a few quantiles would dominate the mean. Masks and `loss_weight` of the
        evaluated data do count. The variational term of models that learn the variance of a step does not.
        """
        names = ("evaluation", set_name, quantile), ("latents", set_name), ("given frames", set_name)
        draws = Draws(0, [quantile] * len(batch.draws), *names)
        return self._noised(batch, draws, NoiseOptions(), LossWeighting(), with_variance=False)

    def _noised(
        self, batch: FeatureBatch, draws: Draws, options: NoiseOptions, weighting: LossWeighting, *, with_variance: bool
    ) -> NoisedBatch:
        pipeline, maths, objective = self.pipeline, self.pipeline.maths, self.pipeline.objective
        clean = clean_latents(
            batch.features,
            lambda shape: _each(lambda name: seeds.normal(shape[1:], draws.seed, *draws.latents, name), batch.draws),
        )
        noise = _each(lambda one, name: sample_noise(one, options, draws.seed, *draws.noise, name), clean, batch.draws)
        sampler, tokens = maths.timesteps, pipeline.tokens(clean.shape[1:])
        t_B = torch.tensor([sampler.timestep(quantile, tokens) for quantile in draws.quantiles], dtype=torch.float32)
        given_B, begin_B, length = self._given(clean, draws, batch.draws)
        inputs = labels = empty = x_t = None
        if self.wants_inputs or with_variance:
            seen = _each(lambda one, name: perturbed(one, options, draws.seed, *draws.noise, name), noise, batch.draws)
            x_t = objective.noised(clean, seen, t_B)
        if self.wants_inputs:
            features = {**batch.features, "latents": clean}
            if given_B is not None:
                features["given_frames"] = given_B
            if begin_B is not None:
                features["section"] = begin_B
            inputs = pipeline.prepare_inputs(features, x_t, t_B)
            if batch.empty is not None:
                empty = pipeline.prepare_inputs({**features, **batch.empty}, x_t, t_B)
        if self.wants_labels:
            weight = batch.weight * over_sample(weighting.weight(objective, t_B), batch.weight)
            weight = weight if given_B is None else weight * loss_weights(given_B, clean.shape[2])
            weight = weight if begin_B is None else weight * weights_of_sections(begin_B, length, clean.shape[2])
            delta_B = maths.distance.delta(t_B, objective.snr(t_B))
            delta = None if delta_B is None else over_sample(delta_B, clean)
            variational = (clean, x_t, t_B) if with_variance else None
            target = objective.target(clean, noise, t_B)
            quantile_B = torch.tensor(draws.quantiles, dtype=torch.float32)
            levels = quantile_B, torch.full_like(quantile_B, batch.share)
            labels = Labels(target, weight, delta, batch.regularising, batch.captioned, variational, levels)
        return NoisedBatch(inputs, labels, empty)

    def _given(
        self, clean: torch.Tensor, draws: Draws, names: Sequence[object]
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, int]:
        """How many of the first frames of each sample are given (B,), None if none is; where the section begins of each
        sample that is trained (B,), None if all of a sample is; and how long the sections are."""
        pipeline, shape = self.pipeline, clean.shape[1:]
        quantiles = [seeds.uniform(draws.seed, *draws.given, name) for name in names]
        given_B = torch.tensor([pipeline.given_frames(shape, quantile) for quantile in quantiles])
        begin_B, length, sections = None, 0, pipeline.sections(shape)
        if sections:
            begin_B = torch.tensor([sections[int(quantile * len(sections))].start for quantile in quantiles])
            length = len(sections[0])
        return given_B if given_B.any() else None, begin_B, length


def clean_latents(features: Features, draw: Callable[[torch.Size], torch.Tensor]) -> torch.Tensor:
    """The clean latents (B, ...) among the features, in float32; `draw` gives standard normal numbers of a shape where
    the features hold a distribution of latents."""
    if "latents" in features:
        return features["latents"].float()
    mean, std = features["latents_mean"].float(), features["latents_std"].float()
    return mean + std * draw(mean.shape)


def _each(make: Callable[..., torch.Tensor], *of_samples: Sequence) -> torch.Tensor:
    """The results of `make` for all samples, as a batch."""
    return torch.stack([make(*one) for one in zip(*of_samples, strict=True)])


def _independent(seed: int, epoch: int, batch: FeatureBatch) -> list[float]:
    return [seeds.uniform(seed, "timestep", epoch, draw) for draw in batch.draws]


def _in_batch(seed: int, epoch: int, batch: FeatureBatch) -> list[float]:
    positions = batch.positions
    return [strata.in_batch(seed, epoch, positions.step, position, positions.of_step) for position in positions.in_step]


def _in_epoch(seed: int, epoch: int, batch: FeatureBatch) -> list[float]:
    return [strata.in_epoch(seed, epoch, position, batch.positions.of_epoch) for position in batch.positions.in_epoch]


QUANTILES: Mapping[str, Callable[[int, int, FeatureBatch], list[float]]] = {
    "none": _independent,
    "batch": _in_batch,
    "epoch": _in_epoch,
}
"""By `stratified_timesteps`: (seed, epoch, batch) -> the quantile at which each sample is trained."""
