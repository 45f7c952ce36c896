"""Adapter files of other programs and of earlier runs -> the factors of this run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from models.foundation.checkpoints.headers import read_header
from models.foundation.checkpoints.key_layouts import KeyLayout
from utils.adapters import lokr
from utils.errors import UserError
from utils.json_files import read_json

Tensors = dict[str, torch.Tensor]
PEFT_PREFIX = "base_model.model."
MARKS = {"LoRA": ".lora_", "LoKr": lokr.MARK, "LoHa": ".hada_"}
"""By what in the names of its tensors an adapter is known."""


def read_adapter(
    path: Path, denoiser: nn.Module, denoiser_folder: str, layout: KeyLayout | None, scale: float
) -> Tensors:
    """The factors in a file or folder under our names, such that `scale` (alpha / rank of this run) gives the effect
    that the file has in the program which wrote it. Reads diffusers', PEFT's and kohya's names.

    Raises:
        UserError: the file is none of these.
    """
    file = _adapter_file(path)
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata() or {}
        tensors = {key: opened.get_tensor(key) for key in opened.keys()}
    if any(".lora_down.weight" in key for key in tensors):
        if layout is None:
            raise UserError.of(
                "kohya's names are not known for this model; give the file in diffusers' layout", str(path)
            )
        known = {
            name: module
            for name, module in denoiser.named_modules()
            if hasattr(module, "out_features") or isinstance(module, nn.Conv2d)
        }
        modules = [name for name in known if ".lora_" not in name and ".base_layer" not in name]
        try:
            factors = layout.lora_from_kohya(tensors, modules, lambda name: known[name].out_features)
        except ValueError as error:
            raise UserError.of(str(error), str(path)) from error
        return _scaled_up(factors, {name: 1.0 / scale for name in factors if name.endswith(".lora_B.weight")})
    factors = {}
    # Where several modules are trained together, our names begin with the folder too.
    folder = "" if hasattr(denoiser, denoiser_folder) else f"{denoiser_folder}."
    for key, tensor in tensors.items():
        name = key.removeprefix(PEFT_PREFIX).removeprefix(folder).removeprefix("diffusion_model.")
        factors[name] = tensor
    modules = [name.removesuffix(".alpha") for name in factors if name.endswith(".alpha")]
    alphas = {module: factors.pop(f"{module}.alpha").item() for module in modules}
    if not any(name.endswith(".lora_A.weight") for name in factors):
        raise _without_factors("LoRA", tensors, path)
    alpha = _common_alpha(file, metadata)
    updates = [name for name in factors if name.endswith(".lora_B.weight")]
    alone = [name for name in updates if name.replace(".lora_B.", ".lora_A.") not in factors]
    if alone:
        raise UserError.of(f"'{alone[0]}' has no lora_A beside it; is the file whole?", str(path))
    return _scaled_up(factors, {name: _scale(name, factors, alphas, alpha) / scale for name in updates})


def read_lokr(path: Path, denoiser: nn.Module, denoiser_folder: str) -> Tensors:
    """The LoKr factors in a file or folder under our names, such that this run's scale gives the effect that the file
    has in the program which wrote it. Reads LyCORIS's names.

    Raises:
        UserError: there are none in it.
    """
    tensors: Tensors = load_file(_adapter_file(path))
    if not any(lokr.MARK in key for key in tensors):
        raise _without_factors("LoKr", tensors, path)
    return lokr.from_lycoris(tensors, denoiser, denoiser_folder)


def _without_factors(wanted: str, tensors: Tensors, path: Path) -> UserError:
    """What to tell of a file that has no factors of the kind that is read."""
    other = next((kind for kind, mark in MARKS.items() if any(mark in key for key in tensors)), None)
    is_there = f"it is a {other}" if other else f"its first tensor is '{next(iter(tensors), 'none')}'"
    return UserError.of(
        f"no {wanted} factors in this file, {is_there}; give a {wanted} here ([adapter] goes on from its own type, and "
        "[[model.preset_adapters]] are LoRAs)",
        str(path),
    )


def _adapter_file(path: Path) -> Path:
    files = read_header(path).paths
    if not files:
        raise UserError.of("this file is empty; download it again", str(path))
    return files[0]


def _common_alpha(file: Path, metadata: Mapping[str, str]) -> float | None:
    """The alpha of all modules: by the header, where diffusers keeps it, or by PEFT's configuration beside the file."""
    known = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    config = file.with_name("adapter_config.json")
    if not known and config.is_file():
        known = read_json(config)
    return next((value for key, value in known.items() if key.split(".")[-1] == "lora_alpha"), None)


def _scale(name: str, factors: Tensors, alphas: Mapping[str, float], common_alpha: float | None) -> float:
    """alpha / rank of the module that a `lora_B` belongs to: by its own alpha, that of all modules, or 1."""
    module = name.removesuffix(".lora_B.weight")
    rank = factors[f"{module}.lora_A.weight"].shape[0]
    return alphas.get(module, rank if common_alpha is None else common_alpha) / rank


def _scaled_up(factors: Tensors, by: Mapping[str, float]) -> Tensors:
    return {name: tensor * by[name] if by.get(name, 1.0) != 1.0 else tensor for name, tensor in factors.items()}
