"""Pictures drawn during training, through the same stages, with the model's stock scheduler."""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from utils import ranks as together
from utils.diffusion import seeds
from utils.diffusion.timesteps import ResolutionShift
from utils.media.writing import tensor_to_image
from utils.parallel.engine import Engine
from utils.ranks import Ranks
from utils.run.metrics import Metrics
from utils.settings.schema import SamplingSettings

logger = logging.getLogger(__name__)

SLUG_LETTERS = 60


@dataclass(frozen=True)
class SampleModel:
    """What sampling needs of a model.

    Attributes:
        features: prompt -> its text features, each (1, ...), on the CPU.
        prepare: (features, x_t, t_B, guidance) -> inputs of the first stage.
        for_scheduler: prediction -> what the scheduler takes.
        latent_shape: (width, height) -> shape of a latent without the batch.
        tokens: latent shape -> image tokens.
        scheduler: -> a stock flow-matching scheduler of diffusers.
        shift: the model's constants for a scheduler that shifts by size.
        decode: latents, each (1, ...) -> pixels, each (C, F, H, W) in [-1, 1].
    """

    features: Callable[[str], Mapping[str, torch.Tensor]]
    prepare: Callable[[Mapping[str, torch.Tensor], torch.Tensor, torch.Tensor, float], tuple]
    for_scheduler: Callable[[torch.Tensor], torch.Tensor]
    latent_shape: Callable[[int, int], tuple[int, ...]]
    tokens: Callable[[Sequence[int]], int]
    scheduler: Callable[[], Any]
    shift: ResolutionShift
    decode: Callable[[Sequence[torch.Tensor]], Sequence[torch.Tensor]]


def sample(
    engine: Engine,
    ranks: Ranks,
    model: SampleModel,
    settings: SamplingSettings,
    folder: Path,
    metrics: Metrics,
    step: int,
    heed: Callable[[], None] = lambda: None,
) -> None:
    """Draws every prompt into `folder/samples/step000100/00_<prompt>.png`, the data ranks sharing the prompts.

    `heed` is called by all ranks before each of their prompts, as often by each; what it raises ends the drawing.
    """
    place = folder / "samples" / f"step{step:06d}"
    place.mkdir(parents=True, exist_ok=True)
    own = range(ranks.data_rank, len(settings.prompts), ranks.data_ranks)
    latents = []
    for first in range(0, len(settings.prompts), ranks.data_ranks):
        heed()
        index = first + ranks.data_rank
        if index in own:
            latents.append(denoise(engine, ranks, model, settings, settings.prompts[index], index))
    if ranks.is_first_stage:
        for index, pixels_CFHW in zip(own, model.decode(latents), strict=True):
            tensor_to_image(pixels_CFHW).save(place / file_name(index, settings.prompts[index]))
    together.barrier()
    if ranks.is_main:
        for index, prompt in enumerate(settings.prompts):
            with Image.open(place / file_name(index, prompt)) as picture:
                metrics.picture(f"samples/{index:02d}", picture.convert("RGB"), step)
        logger.info("samples: %s", place)


def denoise(
    engine: Engine, ranks: Ranks, model: SampleModel, settings: SamplingSettings, prompt: str, index: int
) -> torch.Tensor:
    """The latents (1, ...) of one prompt, on the CPU, the same on every stage.

    The noise depends on (sampling seed, place of the prompt) alone. The steps are those of diffusers' pipelines: noise
    levels from 1 to 1/n, shifted by the scheduler.
    """
    shape = model.latent_shape(settings.width, settings.height)
    latents = seeds.normal((1, *shape), settings.seed, "sample", index)
    scheduler = model.scheduler()
    levels = np.linspace(1.0, 1.0 / settings.steps, settings.steps)
    scheduler.set_timesteps(sigmas=levels, **_shift_arguments(scheduler, model, shape))
    features = model.features(prompt) if ranks.is_first_stage else {}
    for timestep in scheduler.timesteps:
        batches = None
        if ranks.is_first_stage or ranks.is_last_stage:
            t_B = timestep.float().reshape(1) / scheduler.config.num_train_timesteps
            inputs = model.prepare(features, latents, t_B, settings.guidance) if ranks.is_first_stage else None
            batches = [(inputs, None)]
        (prediction,) = engine.predict(batches, 1)
        output = model.for_scheduler(prediction.float().cpu())
        latents = scheduler.step(output, timestep, latents, return_dict=False)[0]
    return latents


def _shift_arguments(scheduler: Any, model: SampleModel, shape: Sequence[int]) -> dict[str, float]:
    """`mu` for a scheduler that shifts by size, by the constants in its own configuration."""
    config = scheduler.config
    if not config.get("use_dynamic_shifting") or "mu" not in inspect.signature(scheduler.set_timesteps).parameters:
        return {}
    rule = ResolutionShift(
        config.get("base_image_seq_len", model.shift.base_tokens),
        config.get("max_image_seq_len", model.shift.max_tokens),
        config.get("base_shift", model.shift.base_shift),
        config.get("max_shift", model.shift.max_shift),
    )
    return {"mu": float(np.log(rule.factor(model.tokens(shape))))}


def file_name(index: int, prompt: str) -> str:
    """00_a_red_star.png"""
    slug = re.sub(r"[^a-z0-9]+", "_", prompt.lower()).strip("_")[:SLUG_LETTERS]
    return f"{index:02d}_{slug}.png"
