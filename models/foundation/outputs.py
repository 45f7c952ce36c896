"""What a run gives out of a model: exported weights, and samples drawn on the way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import nn

from models.base import BasePipeline
from models.foundation.ensemble import Ensemble
from models.foundation.placement import Blueprint
from utils.adapters.attach import scale
from utils.dataset.batches import SampleReader
from utils.dataset.encoders import Encoder, reads_media, reads_text
from utils.dataset.samples import Bucket, Shown, of_prompt
from utils.ranks import Ranks
from utils.run.export import ExportPlan, PartFolder, Tensors, settings_hash
from utils.run.sampling import SampleModel
from utils.settings.errors import SettingsError
from utils.settings.schema import SamplingSettings, Settings, torch_dtype

COMFYUI = "comfyui"


def check_outputs(pipeline: BasePipeline, settings: Settings) -> None:
    """Whether the model gives what the settings ask for: exports in this layout, samples of this size.

    Raises:
        SettingsError: it does not.
    """
    if settings.save_format in (COMFYUI, "both") and pipeline.original_layout is None:
        raise SettingsError.of(
            f'"{settings.save_format}" needs the names of ComfyUI\'s files, which are not known for this model; use '
            '"diffusers"',
            where="key `save_format`",
        )
    if settings.sampling.negative_prompt and not pipeline.guided_by_second_prediction:
        raise SettingsError.of(
            "is not used: guidance is an input of this model; leave it out", where="[sampling] negative_prompt"
        )
    if settings.sampling.negative_prompt and settings.sampling.guidance == pipeline.no_guidance:
        raise SettingsError.of(
            f"is not used: with `guidance = {pipeline.no_guidance:g}` nothing leads away from it; leave it out, or "
            "raise guidance",
            where="[sampling] negative_prompt",
        )
    if settings.sampling.prompts:
        sample_bucket(pipeline, settings.sampling)


def export_plan(pipeline: BasePipeline, settings: Settings, blueprint: Blueprint) -> ExportPlan:
    """What the exports of this run contain."""
    layout, adapter = pipeline.original_layout, settings.adapter
    rows = {
        name: module.out_features
        for name, module in blueprint.denoiser.named_modules()
        if hasattr(module, "out_features")
    }

    def lora_to_kohya(tensors: Tensors) -> Tensors:
        return layout.lora_to_kohya(tensors, lambda module: scale(adapter), rows.__getitem__)

    convert = lora_to_kohya if adapter else layout and layout.to_original
    asked = settings.save_format or ("diffusers" if adapter else "both")
    frozen = {
        name: parameter
        for name, parameter in blueprint.denoiser.named_parameters()
        if not (adapter or parameter.requires_grad or parameter.is_meta)
    }
    return ExportPlan(
        adapter=adapter,
        dtype=torch_dtype(settings.save_dtype) if settings.save_dtype else None,
        formats=("diffusers", COMFYUI) if asked == "both" else (asked,),
        layouts={COMFYUI: convert} if layout else {},
        folders=_folders(pipeline, blueprint.denoiser),
        metadata={
            "trained_with": "penstock",
            "model_type": settings.model.type,
            "base_model": Path(pipeline.denoiser_path).name
            if settings.model.transformer_path
            else settings.model.diffusers_path.resolve().name,
            "settings_hash": settings_hash(settings.model_dump_json()),
        },
        frozen=frozen,
    )


def _folders(pipeline: BasePipeline, denoiser: nn.Module) -> tuple[PartFolder, ...]:
    """The trained modules as parts of a diffusers folder."""
    if not isinstance(denoiser, Ensemble):
        return (PartFolder(pipeline.denoiser_folder, dict(denoiser.config)),)
    return tuple(
        # What is of transformers has another name for its weights.
        PartFolder(name, config, f"{name}.", *(["model"] if "model_type" in config else []))
        for name, config in denoiser.configs.items()
    )


def sample_bucket(pipeline: BasePipeline, sampling: SamplingSettings) -> Bucket:
    """The size of the samples.

    Raises:
        SettingsError: the model makes no pictures of this size.
    """
    size, spatial = (sampling.width, sampling.height), pipeline.media.spatial
    frames = pipeline.media.frames(sampling.frames)
    if frames != sampling.frames:
        raise SettingsError.of(
            f"this model makes clips of {pipeline.media.describe_frames()}; set {frames} instead of {sampling.frames}",
            where="[sampling] frames",
        )
    if any(side % spatial for side in size):
        width, height = (max(spatial, round(side / spatial) * spatial) for side in size)
        raise SettingsError.of(
            f"the sides of this model's pictures are multiples of {spatial}; set {width} x {height} instead of "
            f"{size[0]} x {size[1]}",
            where="[sampling] width, height",
        )
    return Bucket(*size, sampling.frames)


def _latent_shape(pipeline: BasePipeline, sampling: SamplingSettings) -> tuple[int, ...]:
    return pipeline.latent_shape(sampling.width, sampling.height, sampling.frames)


def prompt_encoders(encoders: Sequence[Encoder]) -> list[Encoder]:
    """Those that a prompt goes through."""
    return [encoder for encoder in encoders if not reads_media(encoder)]


def check_texts(encoders: Sequence[Encoder], settings: Settings) -> None:
    """Whether the settings ask for texts alone of a text encoder that reads control images too.

    Raises:
        SettingsError: they do.
    """
    if not any(reads_text(encoder) and reads_media(encoder) for encoder in encoders):
        return
    if settings.sampling.prompts:
        raise SettingsError.of(
            "this model's text encoder reads control images with a caption, and a prompt has none; leave `prompts` out",
            where="[sampling]",
        )
    if not settings.cache_text_embeddings:
        raise SettingsError.of(
            "this model's text encoder reads control images with a caption, which is cached; leave it out",
            where="key `cache_text_embeddings`",
        )


def prompts_shown(pipeline: BasePipeline, sampling: SamplingSettings) -> dict[str, Shown]:
    """The prompts as what text encoders read of samples.

    Raises:
        SettingsError: pictures of this size cannot be drawn; see `sample_bucket`.
    """
    texts = [*sampling.prompts, *([sampling.negative_prompt] if is_guided(pipeline, sampling) else [])]
    return {prompt: of_prompt(prompt, sample_bucket(pipeline, sampling)) for prompt in texts}


def is_guided(pipeline: BasePipeline, sampling: SamplingSettings) -> bool:
    """Whether samples take a second prediction, for the negative prompt."""
    return bool(sampling.prompts) and pipeline.guided_by_second_prediction and sampling.guidance != pipeline.no_guidance


def sample_model(
    pipeline: BasePipeline, encoders: Sequence[Encoder], settings: Settings, ranks: Ranks, cache_dir: Path
) -> SampleModel:
    """How to draw this model's samples; the prompts must be in the cache."""
    autoencoder = encoders[0]
    prompts = prompts_shown(pipeline, settings.sampling)
    reader = SampleReader(prompt_encoders(encoders), cache_dir)

    def features(prompt: str) -> Mapping[str, torch.Tensor]:
        return reader.batch([prompts[prompt]]).features

    def decode(latents: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        autoencoder.load(ranks.device)
        pixels = [autoencoder.decode(one)[0].cpu() for one in latents]
        autoencoder.unload()
        return pixels

    return SampleModel(
        features=features,
        prepare=pipeline.prepare_inputs,
        for_scheduler=pipeline.objective.for_scheduler,
        latent_shape=partial(_latent_shape, pipeline, settings.sampling),
        levels=pipeline.sampling_levels,
        negative_prompt=settings.sampling.negative_prompt if is_guided(pipeline, settings.sampling) else None,
        guided=pipeline.guided,
        rate=pipeline.media.rate,
        tokens=pipeline.tokens,
        scheduler=pipeline.scheduler,
        shift=pipeline.resolution_shift,
        decode=decode,
    )
