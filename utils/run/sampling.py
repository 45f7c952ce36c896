"""Draws samples during training, through the same stages, with the model's stock scheduler."""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from utils.diffusion import seeds
from utils.diffusion.timesteps import ResolutionShift
from utils.media.writing import tensor_to_image, write_clip
from utils.parallel.engine import Engine
from utils.ranks import Ranks
from utils.run.attempts import Attempt
from utils.run.metrics import Metrics
from utils.settings.run_tables import SamplingSettings

logger = logging.getLogger(__name__)

SLUG_LETTERS = 60


@dataclass(frozen=True)
class Schedule:
    """How samples are stepped to.

    Attributes:
        scheduler: -> a stock scheduler of diffusers.
        levels: number of steps -> their noise levels before a flow-matching scheduler shifts them; None for the
            scheduler's own.
        tokens: image tokens of a sample.
        shift: the model's constants for a scheduler that shifts by size.
    """

    scheduler: Callable[[], Any]
    levels: Callable[[int], Sequence[float] | None]
    tokens: int
    shift: ResolutionShift

    def of(self, steps: int) -> Any:
        """The scheduler with its timesteps."""
        scheduler, levels = self.scheduler(), self.levels(steps)
        given = {"num_inference_steps": steps} if levels is None else {"sigmas": np.array(levels)}
        scheduler.set_timesteps(**given, **self._shift_arguments(scheduler, steps))
        return scheduler

    def _shift_arguments(self, scheduler: Any, steps: int) -> dict[str, float]:
        """`mu` for a scheduler that shifts by size, with the constants of its own configuration."""
        config = scheduler.config
        if not config.get("use_dynamic_shifting") or "mu" not in inspect.signature(scheduler.set_timesteps).parameters:
            return {}
        named = {"base_tokens": "base_image_seq_len", "max_tokens": "max_image_seq_len"}
        constants = {field.name: config.get(named.get(field.name, field.name)) for field in fields(self.shift)}
        known = {name: value for name, value in constants.items() if value is not None}
        return {"mu": replace(self.shift, **known).mu(self.tokens, steps)}

    def try_out(self, steps: int) -> None:
        """Goes through all steps with a latent of one value.

        Raises:
            Exception: of many kinds, if the scheduler cannot be built from its configuration or cannot step so.
        """
        scheduler = self.of(steps)
        latents, noise = torch.zeros(1, 1, 1, 1), _noise_arguments(scheduler, 0, 0)
        for timestep in scheduler.timesteps:
            as_input = getattr(scheduler, "scale_model_input", lambda latents, timestep: latents)
            seen = as_input(latents, timestep)
            latents = scheduler.step(seen, timestep, latents, return_dict=False, **noise)[0]


@dataclass(frozen=True)
class SampleModel:
    """What sampling needs of a model.

    Attributes:
        features: index of a prompt -> the features for each of its predictions, each (1, ...), on the CPU: those of the
            prompt and, if there are further predictions, those of the negative prompt.
        predictions: number of predictions per prompt.
        prepare: (features, x_t, t_B, guidance) -> inputs of the first stage.
        for_scheduler: prediction -> the scheduler's input.
        latent_shape: -> shape of a sample's latent without the batch.
        guided: (prediction for the prompt, prediction for the negative prompt, guidance, further ones for the negative
            prompt) -> the guided prediction.
        before, after: (latents, features of the prompt) -> the latents with which the steps begin, or that are decoded.
        features_everywhere: whether these two need the features, which else the first stage alone reads.
        fps: frames per second of a clip.
        schedule: the steps to a sample.
        decode: latents, each (1, ...) -> pixels, each (C, F, H, W) in [-1, 1].
    """

    features: Callable[[int], Sequence[Mapping[str, torch.Tensor]]]
    predictions: int
    prepare: Callable[[Mapping[str, torch.Tensor], torch.Tensor, torch.Tensor, float], tuple]
    for_scheduler: Callable[[torch.Tensor], torch.Tensor]
    latent_shape: Callable[[], tuple[int, ...]]
    guided: Callable[..., torch.Tensor]
    before: Callable[[torch.Tensor, Mapping[str, torch.Tensor]], torch.Tensor]
    after: Callable[[torch.Tensor, Mapping[str, torch.Tensor]], torch.Tensor]
    features_everywhere: bool
    fps: float
    schedule: Schedule
    decode: Callable[[Sequence[torch.Tensor]], Sequence[torch.Tensor]]


def sample(
    engine: Engine,
    ranks: Ranks,
    model: SampleModel,
    settings: SamplingSettings,
    folder: Path,
    metrics: Metrics,
    step: int,
    attempt: Attempt,
) -> None:
    """Draws every prompt into `folder/samples/step000100/00_<prompt>.png`, and the data ranks share the prompts. The
    PNG beside a clip (`.mp4`) is its middle frame.

    Args:
        attempt: of these samples; the ranks meet in it before each prompt.

    Raises:
        Failed, StopRequested: on every rank; see `Attempt.meet`.
    """
    samples_folder = folder / "samples" / f"step{step:06d}"
    attempt.alone(partial(samples_folder.mkdir, parents=True, exist_ok=True))
    own = range(ranks.data_rank, len(settings.prompts), ranks.data_ranks)
    latents = []
    for first in range(0, len(settings.prompts), ranks.data_ranks):
        index = first + ranks.data_rank
        begun = attempt.alone(begin, ranks, model, settings, index) if index in own else None
        attempt.meet()
        if begun:
            latents.append(attempt.in_pipeline(denoise, engine, ranks, model, settings, begun))
    attempt.meet()
    if ranks.is_first_stage:
        names = [file_name(index, settings.prompts[index]) for index in own]
        attempt.alone(_write_all, model, latents, [samples_folder / name for name in names])
    attempt.meet()
    if ranks.is_main:
        paths = [samples_folder / file_name(index, prompt) for index, prompt in enumerate(settings.prompts)]
        attempt.alone(_file, metrics, paths, step)
    attempt.meet()
    if ranks.is_main:
        logger.info("samples: %s", samples_folder)


def _file(metrics: Metrics, paths: Sequence[Path], step: int) -> None:
    for index, path in enumerate(paths):
        with Image.open(path, formats=["PNG"]) as picture:
            metrics.picture(f"samples/{index:02d}", picture.convert("RGB"), step)


@dataclass(frozen=True)
class Begun:
    """A sample before its first step.

    Attributes:
        index: of its prompt.
        scheduler: with its timesteps.
        features: for each prediction; None where no stage reads them.
        latents: (1, ...), noise, or what `SampleModel.before` makes of it.
    """

    index: int
    scheduler: Any
    features: Sequence[Mapping[str, torch.Tensor] | None]
    latents: torch.Tensor


def begin(ranks: Ranks, model: SampleModel, settings: SamplingSettings, index: int) -> Begun:
    """What the sample for the prompt at `index` begins with; the noise depends only on (sampling seed, index)."""
    shape = model.latent_shape()
    scheduler = model.schedule.of(settings.steps)
    read = ranks.is_first_stage or model.features_everywhere
    features = model.features(index) if read else [None] * model.predictions
    latents = seeds.normal((1, *shape), settings.seed, "sample", index)
    # Flow-matching schedulers have no such factor.
    latents = latents * getattr(scheduler, "init_noise_sigma", 1.0)
    return Begun(index, scheduler, features, model.before(latents, features[0]))


def denoise(engine: Engine, ranks: Ranks, model: SampleModel, settings: SamplingSettings, begun: Begun) -> torch.Tensor:
    """The latents (1, ...) of a sample, on the CPU, the same on every stage. The steps are those of diffusers'
    pipelines."""
    scheduler, features, latents = begun.scheduler, begun.features, begun.latents
    as_input = getattr(scheduler, "scale_model_input", lambda latents, timestep: latents)
    noise = _noise_arguments(scheduler, settings.seed, begun.index)
    for timestep in scheduler.timesteps:
        seen = as_input(latents, timestep)
        batches = None
        if ranks.is_first_stage or ranks.is_last_stage:
            t_B = timestep.float().reshape(1) / scheduler.config.num_train_timesteps
            batches = [
                (model.prepare(one, seen, t_B, settings.guidance) if ranks.is_first_stage else None, None)
                for one in features
            ]
        predictions = [prediction.float().cpu() for prediction in engine.predict(batches, model.predictions)]
        prediction, *negative = predictions
        if negative:
            prediction = model.guided(prediction, negative[0], settings.guidance, *negative[1:])
        output = model.for_scheduler(prediction)
        latents = scheduler.step(output, timestep, latents, return_dict=False, **noise)[0]
    return model.after(latents, features[0])


def _write_all(model: SampleModel, latents: Sequence[torch.Tensor], paths: Sequence[Path]) -> None:
    for pixels_CFHW, path in zip(model.decode(latents), paths, strict=True):
        _write(pixels_CFHW, model.fps, path)


def _write(pixels_CFHW: torch.Tensor, fps: float, path: Path) -> None:
    frames = pixels_CFHW.shape[1]
    if frames > 1:
        try:
            write_clip(pixels_CFHW, fps, path.with_suffix(".mp4"))
        except ImportError as error:
            # The training is worth more than a clip of it.
            logger.warning("no mp4 is written, only middle frames: PyAV cannot be imported (%s)", error)
    tensor_to_image(pixels_CFHW[:, frames // 2 :]).save(path)


def _noise_arguments(scheduler: Any, seed: int, index: int) -> dict[str, torch.Generator]:
    """The generator for a scheduler that draws noise in its steps; every stage draws the same noise."""
    if "generator" not in inspect.signature(scheduler.step).parameters:
        return {}
    return {"generator": seeds.generator(seed, "sample steps", index)}


def file_name(index: int, prompt: str) -> str:
    """00_a_red_star.png"""
    slug = re.sub(r"[^a-z0-9]+", "_", prompt.lower()).strip("_")[:SLUG_LETTERS]
    return f"{index:02d}_{slug}.png"
