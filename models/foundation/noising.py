"""Features -> a micro-batch: noise, noise level, noised latents, target. The same for every model.

Every number is a function of (seed, purpose, epoch or set, sample), so that the first and the last stage, each on its
own, arrive at the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from models.base import BasePipeline
from utils.dataset.batches import FeatureBatch
from utils.diffusion import seeds
from utils.diffusion.losses import Labels


@dataclass(frozen=True)
class Noising:
    """Makes micro-batches for one stage.

    Attributes:
        wants_inputs: this is the first stage, which takes what `prepare_inputs` gives.
        wants_labels: this is the last one, which compares its prediction with the target.
    """

    pipeline: BasePipeline
    wants_inputs: bool = True
    wants_labels: bool = True

    def training(self, batch: FeatureBatch, epoch: int) -> tuple[tuple | None, Labels | None]:
        """Each sample at a noise level and with noise drawn for this epoch."""
        seed = self.pipeline.seed
        quantiles = [seeds.uniform(seed, "timestep", epoch, draw) for draw in batch.draws]
        return self._noised(batch, quantiles, seed, ("noise", epoch), ("latents", epoch))

    def evaluation(self, batch: FeatureBatch, set_name: str, quantile: float) -> tuple[tuple | None, Labels | None]:
        """Each sample at the same quantile of the noise levels, with noise that depends on (set, sample, quantile)
        alone: not even on the run's seed, so that runs can be compared."""
        quantiles = [quantile] * len(batch.draws)
        return self._noised(batch, quantiles, 0, ("evaluation", set_name, quantile), ("latents", set_name))

    def _noised(
        self,
        batch: FeatureBatch,
        quantiles: Sequence[float],
        seed: int,
        noise_name: tuple[object, ...],
        latents_name: tuple[object, ...],
    ) -> tuple[tuple | None, Labels | None]:
        def draw(shape: torch.Size, name: tuple[object, ...]) -> torch.Tensor:
            return torch.stack([seeds.normal(shape[1:], seed, *name, one) for one in batch.draws])

        pipeline, objective = self.pipeline, self.pipeline.objective
        clean = pipeline.latents(batch.features, lambda shape: draw(shape, latents_name))
        noise = draw(clean.shape, noise_name)
        sampler, tokens = pipeline.timestep_sampler(), pipeline.tokens(clean.shape[1:])
        t_B = torch.tensor([sampler.timestep(quantile, tokens) for quantile in quantiles], dtype=torch.float32)
        inputs = labels = None
        if self.wants_inputs:
            features = {**batch.features, "latents": clean}
            inputs = pipeline.prepare_inputs(features, objective.noised(clean, noise, t_B), t_B)
        if self.wants_labels:
            labels = Labels(objective.target(clean, noise, t_B), batch.weight)
        return inputs, labels
