"""What the exports of a run contain."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from models.assembly.base_files import published_sum
from models.assembly.sample_checks import check_sampling
from models.assembly.stage import StagedModel, model_names
from models.base import BasePipeline
from models.foundation.checkpoints.headers import read_header
from models.foundation.layers.ensemble import Ensemble
from utils.adapters import attach, mixed
from utils.adapters.kinds import COMFYUI
from utils.diffusion.objectives import Epsilon, VPrediction
from utils.errors import UserError
from utils.run import export_metadata
from utils.run.export import SETTINGS_HASH, ExportPlan, PartFolder, adapter_files, further_layouts
from utils.run.file_names import FileNames
from utils.settings.model_schema import torch_dtype
from utils.settings.reader import settings_hash
from utils.settings.schema import Settings

KOHYA_VERSIONS = {
    "stable-diffusion-v1": "sd_1.5",
    "stable-diffusion-xl-v1-base": "sdxl_base_v1-0",
    "stable-diffusion-3": "sd3",
    "flux-1-dev": "flux1",
    "flux-1-schnell": "flux1",
}
"""What `ss_base_model_version` says of an architecture, where kohya's scripts have a name of their own."""


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
    kinds = mixed.kinds_of(settings.adapter) if settings.adapter else []
    kind = next((kind for kind in kinds if COMFYUI not in kind.formats), None)
    if kind and settings.save_format in (COMFYUI, "both"):
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
    kinds = mixed.kinds_of(settings.adapter) if settings.adapter else []
    known = [name for name in ("diffusers", COMFYUI) if all(name in kind.formats for kind in kinds)]
    return tuple(name for name in known if asked in (name, "both"))


def export_plan(
    pipeline: BasePipeline, settings: Settings, staged: StagedModel, about: Mapping[str, str] | None = None
) -> ExportPlan:
    """What the exports of this run contain.

    Args:
        about: what their headers say of the run, see `about_run`; on the main rank, which writes them.
    """
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
        folders=part_folders(pipeline, staged.denoiser),
        metadata={
            **(about or {}),
            "trained_with": "penstock",
            "model_type": settings.model.type,
            "base_model": _base_name(pipeline),
            SETTINGS_HASH: settings_hash(settings),
        },
        files=FileNames.of(settings),
        frozen=frozen,
        beside=_beside(pipeline, staged, is_adapter=adapter is not None),
        note=pipeline.comfyui_note if COMFYUI in formats else None,
    )


def _base_name(pipeline: BasePipeline) -> str:
    options = pipeline.options
    if options.transformer_path:
        return Path(pipeline.parts.denoiser_path).name
    return options.architecture or options.diffusers_path.resolve().name


def architecture_of(pipeline: BasePipeline) -> str:
    """What ModelSpec calls the model."""
    return pipeline.spec_architecture or pipeline.options.type.replace("_", "-")


def about_run(pipeline: BasePipeline, settings: Settings, of_data: Mapping[str, str]) -> dict[str, str]:
    """What the headers of a run's exports say of it.

    Args:
        of_data: what they say of its data.
    """
    architecture = architecture_of(pipeline)
    kinds = {VPrediction: "v", Epsilon: "epsilon"}
    predicts = next((name for kind, name in kinds.items() if isinstance(pipeline.objective, kind)), None)
    about = {
        **of_data,
        **export_metadata.of_settings(settings),
        # Programs tell adapters by this ending, whatever their kind.
        "modelspec.architecture": f"{architecture}/lora" if settings.adapter else architecture,
        "ss_base_model_version": KOHYA_VERSIONS.get(architecture, architecture),
        "ss_v2": "False",
        "ss_sd_model_name": _base_name(pipeline),
        **({"modelspec.prediction_type": predicts} if predicts else {}),
    }
    return about if settings.model.from_scratch else {**about, **_base_hashes(pipeline)}


def _base_hashes(pipeline: BasePipeline) -> dict[str, str]:
    """The hashes of the base's weights, of the first of several files: the short one, and the whole one if a download
    has left it, since to compute it would read the file."""
    path = Path(pipeline.parts.denoiser_path)
    file = read_header(path, with_gguf=True).paths[0]
    hashes = {"ss_sd_model_hash": export_metadata.legacy_hash(file), "ss_new_sd_model_hash": published_sum(file)}
    return {key: value for key, value in hashes.items() if value}


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


def part_folders(pipeline: BasePipeline, denoiser: nn.Module) -> tuple[PartFolder, ...]:
    """The trained modules as parts of a diffusers folder."""
    if not isinstance(denoiser, Ensemble):
        return (PartFolder(pipeline.denoiser_folder, dict(denoiser.config)),)
    return tuple(
        # Modules of transformers have another file name for their weights.
        PartFolder(name, config, f"{name}.", *(["model"] if "model_type" in config else []))
        for name, config in denoiser.configs.items()
    )
