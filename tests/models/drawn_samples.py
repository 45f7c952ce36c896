"""Samples as latents: drawn by several processes, and by the layers in a row."""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch import nn

from models.assembly.drawings import sample_model
from models.assembly.prompts import encoders_of_prompts, prompt_versions, schedule_of
from models.base import BasePipeline
from tests.models.tiny_folder import settings_of
from utils.dataset.encoders import inputs_of
from utils.dataset.encoding import CacheJob, features_of, fill
from utils.diffusion import seeds
from utils.ranks import Ranks
from utils.settings.run_tables import SamplingSettings
from utils.settings.sample_requests import requests_of


def sampling_of(model: ModuleType, prompt: str) -> SamplingSettings:
    """Four steps of a tiny model."""
    return SamplingSettings(**{"prompts": [prompt], "steps": 4, "seed": 7, **model.SAMPLING})


def draw_samples(
    ranks: Ranks,
    pipeline_of: Callable[[Path], BasePipeline],
    folder: Path,
    cache: Path,
    stages: int,
    sampling: SamplingSettings,
) -> list[np.ndarray]:
    """Job of a rank: the latents of every prompt."""
    from models.assembly.stage import load_stage
    from utils.parallel.backend import initialize_deepspeed
    from utils.parallel.engine import Engine
    from utils.parallel.pipeline import DenoiserPipeline
    from utils.run.sampling import begin, denoise

    initialize_deepspeed()
    ranks = ranks.with_stages(stages)
    pipeline = pipeline_of(folder)
    settings = settings_of(pipeline, sampling=sampling, pipeline_stages=stages)
    staged = load_stage(pipeline, settings, ranks.stage)
    module = DenoiserPipeline(staged.layers, staged.bounds, pipeline.stream_type, pipeline.maths.loss)
    engine = Engine(module, torch.optim.SGD(module.parameters(), lr=0.0), accumulation=1, clip_norm=0.0)
    requests = requests_of(settings.sampling, pipeline.guided_by_second_prediction)
    prompts = [version.sample for one in requests for version in prompt_versions(pipeline, one.settings)]
    encoders = pipeline.encoders(0 if pipeline.starts_from_picture else len(prompts[0].controls))
    job = CacheJob(cache, folder, ranks)
    with job.alone():
        for encoder in encoders_of_prompts(encoders, requests):
            fill(encoder, prompts, job)
    model = sample_model(pipeline, encoders, settings, ranks, cache)
    return [denoise(engine, ranks, model, begin(ranks, model, drawing)).numpy() for drawing in model.drawings()]


@torch.no_grad()
def draw_here(
    pipeline: BasePipeline, layers: list[nn.Module], sampling: SamplingSettings, noise: torch.Tensor
) -> torch.Tensor:
    """The latents of the first prompt, of a model that is guided by a second prediction."""
    features: list[dict[str, torch.Tensor]] = [{}, {}]
    versions = prompt_versions(pipeline, sampling)
    for encoder in encoders_of_prompts(pipeline.encoders(), requests_of(sampling, True)):
        encoder.load(torch.device("cpu"))
        for version, made in zip(versions, features, strict=True):
            own = features_of({"": inputs_of(encoder, version)}, encoder)[""]
            made |= {name: feature.unsqueeze(0) for name, feature in own.items()}
    scheduler = schedule_of(pipeline, sampling).of(sampling.steps)
    drawing = {"generator": seeds.generator(sampling.seed, "sample steps", 0)}
    if "generator" not in signature(scheduler.step).parameters:
        drawing = {}
    latents = pipeline.before_steps(noise * getattr(scheduler, "init_noise_sigma", 1.0), features[0])
    for timestep in scheduler.timesteps:
        t_B, predictions = timestep.float().reshape(1) / scheduler.config.num_train_timesteps, []
        for made in features:
            stream = pipeline.prepare_inputs(made, latents, t_B)
            for layer in layers:
                stream = layer.eval()(stream)
            predictions.append(pipeline.objective.for_scheduler(stream))
        guided = pipeline.guided(*predictions, sampling.guidance)
        latents = scheduler.step(guided, timestep, latents, return_dict=False, **drawing)[0]
    return pipeline.after_steps(latents, features[0])
