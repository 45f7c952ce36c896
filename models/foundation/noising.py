"""Features -> a micro-batch: noise, noise level, noised latents, target. The same for every model.

Every number is a function of (seed, purpose, epoch or set, sample), so that the first and the last stage, each on its
own, arrive at the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from models.base import BasePipeline
from utils.dataset.batches import FeatureBatch
from utils.diffusion import seeds
from utils.diffusion.losses import Labels


def training_micro_batch(pipeline: BasePipeline, batch: FeatureBatch, epoch: int) -> tuple[tuple, Labels]:
    """Each sample at a noise level and with noise drawn for this epoch."""
    quantiles = [seeds.uniform(pipeline.seed, "timestep", epoch, sample) for sample in batch.sample_ids]
    return _noised(pipeline, batch.features, batch.sample_ids, quantiles, ("noise", epoch))


def evaluation_micro_batch(
    pipeline: BasePipeline, batch: FeatureBatch, set_name: str, quantile: float
) -> tuple[tuple, Labels]:
    """Each sample at the same quantile of the noise levels, with noise that depends on (set, sample, quantile) alone:
    not even on the run's seed, so that runs can be compared."""
    quantiles = [quantile] * len(batch.sample_ids)
    return _noised(pipeline, batch.features, batch.sample_ids, quantiles, ("evaluation", set_name, quantile), seed=0)


def _noised(
    pipeline: BasePipeline,
    features: Mapping[str, torch.Tensor],
    samples: Sequence[str],
    quantiles: Sequence[float],
    draw: tuple[object, ...],
    seed: int | None = None,
) -> tuple[tuple, Labels]:
    clean = pipeline.latents(features)
    shape = clean.shape[1:]
    seed = pipeline.seed if seed is None else seed
    noise = torch.stack([seeds.normal(shape, seed, *draw, sample) for sample in samples])
    sampler, tokens = pipeline.timestep_sampler(), pipeline.tokens(shape)
    t_B = torch.tensor([sampler.timestep(quantile, tokens) for quantile in quantiles], dtype=torch.float32)
    inputs = pipeline.prepare_inputs(features, pipeline.objective.noised(clean, noise, t_B), t_B)
    return inputs, Labels(pipeline.objective.target(clean, noise, t_B), torch.ones(len(samples)))
