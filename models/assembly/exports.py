"""What the exports of a run contain."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from models.assembly.prompts import check_sampling
from models.assembly.stage import StagedModel, model_names
from models.base import BasePipeline
from models.foundation.layers.ensemble import Ensemble
from utils.errors import UserError
from utils.run.export import ExportPlan, PartFolder, settings_hash
from utils.settings.model_schema import torch_dtype
from utils.settings.schema import Settings

COMFYUI = "comfyui"


def check_outputs(pipeline: BasePipeline, settings: Settings) -> None:
    """Whether the model supports the requested outputs: exports in this layout, samples of this size.

    Raises:
        UserError: it does not support them.
    """
    if settings.save_format in (COMFYUI, "both") and pipeline.original_layout is None:
        raise UserError.of(
            f'"{settings.save_format}" needs the names of ComfyUI\'s files, which are not known for this model; use '
            '"diffusers"',
            where="key `save_format`",
        )
    check_sampling(pipeline, settings.sampling)


def export_plan(pipeline: BasePipeline, settings: Settings, staged: StagedModel) -> ExportPlan:
    """What the exports of this run contain."""
    layout, adapter = pipeline.original_layout, settings.adapter
    asked = settings.save_format or ("diffusers" if adapter else "both")
    frozen = {
        name: parameter
        for name, parameter in staged.denoiser.named_parameters()
        if not (adapter or parameter.requires_grad or parameter.is_meta)
    }
    return ExportPlan(
        adapter=adapter,
        names=model_names(pipeline, staged.denoiser) if adapter else None,
        dtype=torch_dtype(settings.save_dtype) if settings.save_dtype else None,
        formats=("diffusers", COMFYUI) if asked == "both" else (asked,),
        layouts={COMFYUI: layout.to_original} if layout and not adapter else {},
        folders=_folders(pipeline, staged.denoiser),
        metadata={
            "trained_with": "penstock",
            "model_type": settings.model.type,
            "base_model": Path(pipeline.parts.denoiser_path).name
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
        # Modules of transformers have another file name for their weights.
        PartFolder(name, config, f"{name}.", *(["model"] if "model_type" in config else []))
        for name, config in denoiser.configs.items()
    )
