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
from PIL.PngImagePlugin import PngInfo

from utils.adapters.attach import at_strength
from utils.diffusion import seeds
from utils.diffusion.timesteps import ResolutionShift
from utils.media.writing import tensor_to_image, write_clip
from utils.parallel.engine import Engine
from utils.ranks import Ranks
from utils.run.attempts import Attempt, reason_of
from utils.run.clip_score import ClipScore
from utils.run.contact_sheet import write_sheet
from utils.run.metrics import Metrics
from utils.run.sample_texts import PARAMETERS, Origin, parameters
from utils.settings.sample_requests import SampleRequest

logger = logging.getLogger(__name__)

SLUG_LETTERS = 60
CLIP_SCORE = "samples/clip_score"
"""The name of its metric."""


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
        latents, noise = torch.zeros(1, 1, 1, 1), _noise_arguments(scheduler, torch.Generator())
        for timestep in scheduler.timesteps:
            as_input = getattr(scheduler, "scale_model_input", lambda latents, timestep: latents)
            seen = as_input(latents, timestep)
            latents = scheduler.step(seen, timestep, latents, return_dict=False, **noise)[0]


@dataclass(frozen=True)
class Drawing:
    """A sample, and how its model draws it.

    Attributes:
        features: -> the features for each of its predictions, each (1, ...), on the CPU: those of the prompt and, if
            there are further predictions, those of the negative prompt.
        predictions: how many there are for a step.
        latent_shape: of its latent, without the batch.
        schedule: the steps to it.
        passes: further features of each pass through the steps. A model that makes a clip in sections has a pass for
            each, which begins with what the one before has left.
    """

    request: SampleRequest
    features: Callable[[], Sequence[Mapping[str, torch.Tensor]]]
    predictions: int
    latent_shape: tuple[int, ...]
    schedule: Schedule
    passes: Sequence[Mapping[str, torch.Tensor]] = ({},)


@dataclass(frozen=True)
class SampleModel:
    """What sampling needs of a model.

    Attributes:
        drawings: -> what is to be drawn; a file of prompts is read anew. All ranks call it together.
        prepare: (features, x_t, t_B, guidance) -> inputs of the first stage.
        for_scheduler: prediction -> the scheduler's input.
        guided: (prediction for the prompt, prediction for the negative prompt, guidance, further ones for the negative
            prompt) -> the guided prediction.
        before, after: (latents, features of the prompt) -> the latents with which the steps begin, or that are decoded.
        features_everywhere: whether these two need the features, which else the first stage alone reads.
        noise_dtype: in which the stock pipeline draws its noise.
        fps: frames per second of a clip.
        decode: latents, each (1, ...) -> pixels, each (C, F, H, W) in [-1, 1].
        name: of the model, for the texts in samples.
        score: how well pictures fit their prompts, if that is asked for.
    """

    drawings: Callable[[], Sequence[Drawing]]
    prepare: Callable[[Mapping[str, torch.Tensor], torch.Tensor, torch.Tensor, float], tuple]
    for_scheduler: Callable[[torch.Tensor], torch.Tensor]
    guided: Callable[..., torch.Tensor]
    before: Callable[[torch.Tensor, Mapping[str, torch.Tensor]], torch.Tensor]
    after: Callable[[torch.Tensor, Mapping[str, torch.Tensor]], torch.Tensor]
    features_everywhere: bool
    noise_dtype: torch.dtype
    fps: float
    decode: Callable[[Sequence[torch.Tensor]], Sequence[torch.Tensor]]
    name: str = ""
    score: ClipScore | None = None


def sample(
    engine: Engine, ranks: Ranks, model: SampleModel, folder: Path, metrics: Metrics, step: int, attempt: Attempt
) -> None:
    """Draws every sample into `folder/samples/step000100/00_<prompt>.png`, and the data ranks share them. The PNG
    beside a clip (`.mp4`) is its middle frame. `folder/samples/sheet.png` shows those of all steps together.

    Args:
        attempt: of these samples; the ranks meet in it before each one.

    Raises:
        Failed, StopRequested: on every rank; see `Attempt.meet`.
    """
    samples_folder = folder / "samples" / f"step{step:06d}"
    drawings = draw_into(samples_folder, engine, ranks, model, Origin(model.name, folder.name, step), attempt)
    if ranks.is_main:
        paths = [samples_folder / file_name(drawing.request) for drawing in drawings]
        attempt.alone(_file, metrics, paths, step)
        attempt.alone(_score, model, metrics, drawings, paths, step)
        _show_together(folder / "samples")
    attempt.meet()


def draw_into(
    folder: Path, engine: Engine, ranks: Ranks, model: SampleModel, origin: Origin, attempt: Attempt
) -> Sequence[Drawing]:
    """Draws every sample into a folder, and returns what was drawn; see `sample`."""
    drawings = model.drawings()
    attempt.alone(partial(folder.mkdir, parents=True, exist_ok=True))
    own = drawings[ranks.data_rank :: ranks.data_ranks]
    latents, swap = [], engine.module.swap
    for turn in range(-(-len(drawings) // ranks.data_ranks)):
        begun = attempt.alone(begin, ranks, model, own[turn]) if turn < len(own) else None
        attempt.meet()
        with swap.hand_in_hand():
            if begun:
                drawn = attempt.in_pipeline(denoise, engine, ranks, model, begun, all_ranks=swap.needs_all_ranks)
                latents.append(drawn)
    attempt.meet()
    if ranks.is_first_stage:
        attempt.alone(_write_all, model, latents, own, folder, origin)
    attempt.meet()
    if ranks.is_main:
        logger.info("samples: %s", folder)
    return drawings


def _file(metrics: Metrics, paths: Sequence[Path], step: int) -> None:
    for index, path in enumerate(paths):
        with Image.open(path, formats=["PNG"]) as picture:
            metrics.picture(f"samples/{index:02d}", picture.convert("RGB"), step)


def _score(model: SampleModel, metrics: Metrics, drawings: Sequence[Drawing], paths: Sequence[Path], step: int) -> None:
    if model.score is None:
        return
    value = model.score.of(paths, [drawing.request.prompt for drawing in drawings])
    if value is not None:
        metrics.scalars({CLIP_SCORE: value}, step)


def _show_together(folder: Path) -> None:
    """The sheet, which is worth no failure: its pictures are all there."""
    try:
        write_sheet(folder)
    except Exception as error:
        logger.warning("%s is not written: %s", folder / "sheet.png", reason_of(error))


@dataclass(frozen=True)
class Begun:
    """A sample before its first step.

    Attributes:
        scheduler: with its timesteps.
        features: for each prediction; None where no stage reads them.
        latents: (1, ...), noise, or what `SampleModel.before` makes of it.
        generator: of what the scheduler draws in its steps, the same on every stage.
    """

    drawing: Drawing
    scheduler: Any
    features: Sequence[Mapping[str, torch.Tensor] | None]
    latents: torch.Tensor
    generator: torch.Generator


def begin(ranks: Ranks, model: SampleModel, drawing: Drawing) -> Begun:
    """What a sample begins with. Its noise depends only on (sampling seed, its place); or on its own seed, as in stock
    pipelines, where one generator draws the noise and what follows."""
    request, shape = drawing.request, (1, *drawing.latent_shape)
    scheduler = drawing.schedule.of(request.settings.steps)
    read = ranks.is_first_stage or model.features_everywhere
    features = drawing.features() if read else [None] * drawing.predictions
    if request.seeded:
        generator = torch.Generator().manual_seed(request.settings.seed)
        latents = torch.randn(shape, generator=generator, dtype=model.noise_dtype).float()
    else:
        generator = seeds.generator(request.settings.seed, "sample steps", request.place)
        latents = seeds.normal(shape, request.settings.seed, "sample", request.place)
    # Flow-matching schedulers have no such factor.
    latents = latents * getattr(scheduler, "init_noise_sigma", 1.0)
    return Begun(drawing, scheduler, features, model.before(latents, features[0]), generator)


def denoise(engine: Engine, ranks: Ranks, model: SampleModel, begun: Begun) -> torch.Tensor:
    """The latents (1, ...) of a sample, on the CPU, the same on every stage. The steps are those of diffusers'
    pipelines."""
    drawing, latents = begun.drawing, begun.latents
    settings = drawing.request.settings
    with at_strength(engine.module, settings.adapter_scale):
        for number, further in enumerate(drawing.passes):
            scheduler = drawing.schedule.of(settings.steps) if number else begun.scheduler
            latents = _stepped(engine, ranks, model, replace(begun, scheduler=scheduler, latents=latents), further)
    return model.after(latents, begun.features[0])


def _stepped(
    engine: Engine, ranks: Ranks, model: SampleModel, begun: Begun, further: Mapping[str, torch.Tensor]
) -> torch.Tensor:
    """The latents (1, ...) after one pass through the steps, with these features beside those of the prompts."""
    scheduler, features, latents = begun.scheduler, begun.features, begun.latents
    guidance = begun.drawing.request.settings.guidance
    as_input = getattr(scheduler, "scale_model_input", lambda latents, timestep: latents)
    noise = _noise_arguments(scheduler, begun.generator)
    for timestep in scheduler.timesteps:
        seen = as_input(latents, timestep)
        batches = None
        if ranks.is_first_stage or ranks.is_last_stage:
            t_B = timestep.float().reshape(1) / scheduler.config.num_train_timesteps
            batches = [
                (model.prepare({**one, **further}, seen, t_B, guidance) if ranks.is_first_stage else None, None)
                for one in features
            ]
        predictions = [p.float().cpu() for p in engine.predict(batches, begun.drawing.predictions)]
        prediction, *negative = predictions
        if negative:
            prediction = model.guided(prediction, negative[0], guidance, *negative[1:])
        output = model.for_scheduler(prediction)
        latents = scheduler.step(output, timestep, latents, return_dict=False, **noise)[0]
    return latents


def _write_all(
    model: SampleModel, latents: Sequence[torch.Tensor], drawings: Sequence[Drawing], folder: Path, origin: Origin
) -> None:
    for pixels_CFHW, drawing in zip(model.decode(latents), drawings, strict=True):
        text = parameters(drawing.request, origin, type(drawing.schedule.scheduler()).__name__)
        _write(pixels_CFHW, model.fps, folder / file_name(drawing.request), text)


def _write(pixels_CFHW: torch.Tensor, fps: float, path: Path, text: str = "") -> None:
    frames = pixels_CFHW.shape[1]
    if frames > 1:
        try:
            write_clip(pixels_CFHW, fps, path.with_suffix(".mp4"), comment=text)
        except ImportError as error:
            # The training is worth more than a clip of it.
            logger.warning("no mp4 is written, only middle frames: PyAV cannot be imported (%s)", error)
    texts = PngInfo()
    if text:
        texts.add_itxt(PARAMETERS, text) if not text.isascii() else texts.add_text(PARAMETERS, text)
    tensor_to_image(pixels_CFHW[:, frames // 2 :]).save(path, pnginfo=texts)


def _noise_arguments(scheduler: Any, generator: torch.Generator) -> dict[str, torch.Generator]:
    """The generator for a scheduler that draws noise in its steps."""
    if "generator" not in inspect.signature(scheduler.step).parameters:
        return {}
    return {"generator": generator}


def file_name(request: SampleRequest) -> str:
    """00_a_red_star.png"""
    slug = re.sub(r"[^a-z0-9]+", "_", request.prompt.lower()).strip("_")[:SLUG_LETTERS]
    return f"{request.place:02d}_{slug}.png"
