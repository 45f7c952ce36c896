"""What the exports of a run contain."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from models.assembly.sample_checks import check_sampling
from models.assembly.stage import StagedModel, model_names
from models.base import BasePipeline
from models.foundation.layers.ensemble import Ensemble
from utils import adapters
from utils.adapters import attach
from utils.adapters.kinds import COMFYUI
from utils.errors import UserError
from utils.run.export import SETTINGS_HASH, ExportPlan, PartFolder, adapter_files, further_layouts
from utils.settings.model_schema import torch_dtype
from utils.settings.reader import settings_hash
from utils.settings.schema import Settings


def check_outputs(pipeline: BasePipeline, settings: Settings) -> None:
    """Whether the model supports the requested outputs: exports in this layout, samples of these sizes.

    Raises:
        UserError: it does not support them.
    """
    if settings.save_format in (COMFYUI, "both") and pipeline.original_layout is None:
        raise UserError.of(
            f'"{settings.save_format}" needs the names of ComfyUI\'s files, which are not known for this model; use '
            '"diffusers"',
            where="key `save_format`",
        )
    kind = settings.adapter and adapters.find(settings.adapter.type)
    if kind and settings.save_format in (COMFYUI, "both") and COMFYUI not in kind.formats:
        raise UserError.of(
            f'ComfyUI does not read {kind.name}, of which "{settings.save_format}" asks for a file; use "diffusers", '
            "or another [adapter] type",
            where="key `save_format`",
        )
    check_sampling(pipeline, settings.sampling, has_adapter=settings.adapter is not None)


def check_exports(pipeline: BasePipeline, settings: Settings, staged: StagedModel) -> None:
    """Whether everything that is trained has a name in every requested layout, so that no gap of a layout waits for the
    end of a run: makes the exports of a model whose weights take no memory.

    Raises:
        UserError: something has no place there.
    """
    plan = export_plan(pipeline, settings, staged)
    tensors = {name: parameter.to("meta") for name, parameter in staged.trained(staged.layers).items()}
    try:
        if plan.adapter:
            names = replace(plan.names, read=lambda name: torch.empty(plan.names.shapes[name], device="meta"))
            tensors |= beside_factors(staged, of_this_process=False)
            adapter_files(tensors, replace(plan, dtype=None, names=names), {})
        else:
            frozen = {name: p.to("meta") for name, p in staged.denoiser.named_parameters() if not p.requires_grad}
            beside = {name: torch.empty(0, device="meta") for name in pipeline.weights.beside()}
            for _ in further_layouts({**beside, **frozen, **tensors}, plan):
                pass
    except UserError:
        raise
    except ValueError as error:
        raise UserError.of(
            f'{error}: this form of the model is not known to ComfyUI\'s layout; set "diffusers"',
            where="key `save_format`",
        ) from error


def formats_of(pipeline: BasePipeline, settings: Settings) -> tuple[str, ...]:
    """The names of the layouts in which the run exports."""
    asked = settings.save_format or ("both" if pipeline.original_layout else "diffusers")
    known = adapters.find(settings.adapter.type).formats if settings.adapter else ("diffusers", COMFYUI)
    return tuple(name for name in ("diffusers", COMFYUI) if asked in (name, "both") and name in known)


def export_plan(pipeline: BasePipeline, settings: Settings, staged: StagedModel) -> ExportPlan:
    """What the exports of this run contain."""
    layout, adapter = pipeline.original_layout, settings.adapter
    formats = formats_of(pipeline, settings)
    frozen = {
        name: parameter
        for name, parameter in staged.denoiser.named_parameters()
        if not (adapter or parameter.requires_grad or parameter.is_meta)
    }
    return ExportPlan(
        adapter=adapter,
        names=model_names(pipeline, staged.denoiser) if adapter else None,
        dtype=torch_dtype(settings.save_dtype) if settings.save_dtype else None,
        formats=formats,
        layouts={COMFYUI: layout.to_original} if layout and not adapter else {},
        folders=_folders(pipeline, staged.denoiser),
        metadata={
            "trained_with": "penstock",
            "model_type": settings.model.type,
            "base_model": Path(pipeline.parts.denoiser_path).name
            if settings.model.transformer_path
            else settings.model.architecture or settings.model.diffusers_path.resolve().name,
            SETTINGS_HASH: settings_hash(settings),
        },
        frozen=frozen,
        beside=_beside(pipeline, staged, is_adapter=adapter is not None),
        note=pipeline.comfyui_note if COMFYUI in formats else None,
    )


def _beside(pipeline: BasePipeline, staged: StagedModel, *, is_adapter: bool) -> dict[str, Callable[[], torch.Tensor]]:
    """What this process writes beside its weights that are trained."""
    if is_adapter:
        return {name: partial(_same, tensor) for name, tensor in beside_factors(staged).items()}
    # Of all processes one writes it.
    return dict(pipeline.weights.beside()) if _holds_first(staged) else {}


def beside_factors(staged: StagedModel, *, of_this_process: bool = True) -> dict[str, torch.Tensor]:
    """What files need beside the trained factors of an adapter; without memory, of modules of other processes too."""
    found = {
        f"{module}{ending}": tensor
        for module, (kind, layer) in attach.adapted(staged.denoiser).items()
        for ending, tensor in kind.beside(layer).items()
    }
    if of_this_process:
        return {name: tensor for name, tensor in found.items() if not tensor.is_meta}
    return {name: tensor.to("meta") for name, tensor in found.items()}


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _holds_first(staged: StagedModel) -> bool:
    """Whether this process has the weights of the first stage."""
    return not any(parameter.is_meta for parameter in staged.layers[0].parameters())


def _folders(pipeline: BasePipeline, denoiser: nn.Module) -> tuple[PartFolder, ...]:
    """The trained modules as parts of a diffusers folder."""
    if not isinstance(denoiser, Ensemble):
        return (PartFolder(pipeline.denoiser_folder, dict(denoiser.config)),)
    return tuple(
        # Modules of transformers have another file name for their weights.
        PartFolder(name, config, f"{name}.", *(["model"] if "model_type" in config else []))
        for name, config in denoiser.configs.items()
    )
