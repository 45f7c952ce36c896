"""What the tests of SDXL and Stable Diffusion 1.5 share: loading one, moving its weights, what it makes of text."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

from models.assembly.exports import export_plan
from models.assembly.stage import StagedModel, load_stage
from models.families.stable_diffusion import StableDiffusionPipeline as OurPipeline
from tests import test_models as generic
from tests.models import tiny_sd15, tiny_sdxl
from tests.models.tiny_folder import encoded, settings_of
from utils.adapters.lora import LoraSettings
from utils.diffusion.seeds import normal
from utils.ranks import Ranks
from utils.run.export import export
from utils.settings.schema import AdapterSettings

CAPTIONS = ["a hiker on a ridge", "two motorcycles and a dog"]
TINY = {"sd15": tiny_sd15, "sdxl": tiny_sdxl}
STOCK = {"sd15": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline}


def loaded(pipeline: OurPipeline, adapter: AdapterSettings | None = None) -> StagedModel:
    return load_stage(pipeline, settings_of(pipeline, adapter), stage=0)


def parameters_of(pipeline: OurPipeline) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in loaded(pipeline).denoiser.named_parameters()}


def lora(**keys: Any) -> AdapterSettings:
    return LoraSettings(**{"type": "lora", "rank": 4, "alpha": 2.0, **keys})


def without_weights(folder: Path, place: Path) -> Path:
    """What remains of a folder beside a single file."""
    shutil.copytree(folder, place, symlinks=False)
    for file in place.rglob("*.safetensors"):
        file.unlink()
    return place


def features_of(pipeline: OurPipeline, captions: list[str], *, weighted_tags: bool = False) -> dict[str, torch.Tensor]:
    made: dict[str, Any] = {}
    for encoder in generic.prompt_encoders(pipeline.encoders()):
        made |= encoded(encoder, captions, weighted_tags=weighted_tags)
    return made


def moved(pipeline: OurPipeline, place: Path, adapter: AdapterSettings | None) -> StagedModel:
    settings = settings_of(pipeline, adapter, save_format="both")
    staged = loaded(pipeline, adapter)
    parameters = staged.trained(staged.layers)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.add_(normal(tuple(parameter.shape), 0, "moved", name), alpha=0.1)
    export(place, Ranks(), parameters, export_plan(pipeline, settings, staged), step=7)
    return staged
