"""LoRA, implemented by PEFT: the update of a layer is the product of two matrices of low rank (Hu et al. 2021).

PEFT wraps each adapted module: `to_q.weight` becomes `to_q.base_layer.weight`, and `to_q.lora_A.default.weight` and
`to_q.lora_B.default.weight` are added.

Shapes: R rank, I inputs, O outputs of a layer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import nn
from torch.nn import functional

from utils.adapters.kinds import (
    ADAPTER,
    ADAPTER_FILE,
    AdapterFile,
    ExportWishes,
    LowRankKeys,
    ModelNames,
    Tensors,
    without_scale,
)
from utils.errors import UserError
from utils.json_files import read_json
from utils.settings.schema import AdapterSettings
from utils.settings.values import Count

PEFT_PREFIX = "base_model.model."
A, B = ".lora_A.weight", ".lora_B.weight"
COMFYUI = "comfyui"


class LoraSettings(AdapterSettings, LowRankKeys):
    """`type = "lora"`: LoRA, whose update of a layer is the product of two matrices of low rank."""

    binds_checkpoint: ClassVar[tuple[str, ...]] = ("type", "rank", "alpha", "include", "exclude")

    type: Literal["lora"]
    """Kind of adapter."""
    rank: Count
    """Rank of the update of each adapted layer."""


class LowRankUpdate(NamedTuple):
    """The update of a layer's weight by a LoRA: up @ down. For a convolution they are (R, I, ...) and (O, R, 1,
    ...)."""

    down: torch.Tensor
    up: torch.Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight."""
        return len(self.up), *self.down.shape[1:]

    def delta(self) -> torch.Tensor:
        """The whole update in float32, in the shape of the weight."""
        return (self.up.flatten(1).float() @ self.down.flatten(1).float()).view(self.shape)

    def kept(self, weight: float) -> tuple[torch.Tensor, ...]:
        """Both factors."""
        return self.down * weight, self.up

    @staticmethod
    def applied(x: torch.Tensor, *kept: torch.Tensor) -> torch.Tensor:
        """`x` through both factors."""
        down, up = kept
        return functional.linear(functional.linear(x, down), up)


class Lora:
    """See `AdapterKind`."""

    settings = LoraSettings
    name = "LoRA"
    mark = ".lora_"

    def put(self, denoiser: nn.Module, names: Sequence[str], settings: LoraSettings) -> None:
        """As PEFT does, with layers of ours."""
        # PEFT is imported here, since reading settings does not need it.
        from peft import LoraConfig, inject_adapter_in_model

        from utils.adapters.peft_layers import LAYERS

        # A pattern must match the whole name; with a list, PEFT also adapts modules whose names end with an entry.
        pattern = "|".join(map(re.escape, names))
        config = LoraConfig(
            r=settings.rank,
            lora_alpha=_alpha(settings),
            lora_dropout=settings.dropout,
            bias="none",
            target_modules=pattern,
        )
        config._register_custom_module(LAYERS)
        inject_adapter_in_model(config, denoiser, low_cpu_mem_usage=True)

    def base_of(self, module: nn.Module) -> nn.Module | None:
        """The module in PEFT's layer."""
        from peft.tuners.lora import LoraLayer

        return module.get_base_layer() if isinstance(module, LoraLayer) else None

    def reset(self, module: nn.Module, dtype: torch.dtype) -> None:
        """PEFT's first values."""
        for factor in (module.lora_A[ADAPTER], module.lora_B[ADAPTER]):
            factor.to_empty(device="cpu").to(dtype)
        module.reset_lora_parameters(ADAPTER, init_lora_weights=True)

    def scale_of(self, module: nn.Module) -> float:
        """alpha / rank."""
        return module.scaling[ADAPTER]

    def switched_off(self, module: nn.Module) -> AbstractContextManager[None]:
        """The layers skip their factors at a scale of 0."""
        return without_scale(module)

    def is_in(self, names: Sequence[str]) -> bool:
        """By the names of kohya, and of diffusers and PEFT."""
        return any(".lora_down.weight" in name or name.endswith(A) for name in names)

    def from_file(self, file: AdapterFile, names: ModelNames, scale_of: Callable[[str], float]) -> Tensors:
        """Reads diffusers', PEFT's and kohya's names."""
        if any(".lora_down.weight" in key for key in file.tensors):
            factors, scales = _from_kohya(file, names), {}
        else:
            factors, scales = _from_peft(file, names)
        ratios = {name: scales.get(name, 1.0) / scale_of(name.removesuffix(B)) for name in factors if name.endswith(B)}
        return {
            name: tensor * ratios[name] if ratios.get(name, 1.0) != 1.0 else tensor for name, tensor in factors.items()
        }

    def to_files(self, factors: Tensors, settings: LoraSettings, wishes: ExportWishes) -> dict[str, AdapterFile | str]:
        """`adapter_model.safetensors` with keys "transformer.<module>.lora_A.weight", and PEFT's `adapter_config.json`;
        for ComfyUI a file with kohya's names.

        diffusers assumes alpha = rank unless the header says otherwise, in the key that its own exporter writes.
        """
        scale = _alpha(settings) / settings.rank
        alpha = settings.rank * scale
        config = {
            "peft_type": "LORA",
            "r": settings.rank,
            "lora_alpha": alpha,
            "lora_dropout": settings.dropout,
            "bias": "none",
            "target_modules": sorted({name.split(self.mark)[0] for name in factors}),
            "base_model_name_or_path": wishes.metadata.get("base_model"),
        }
        metadata = {**wishes.metadata, "rank": str(settings.rank), "alpha": str(alpha)}
        files: dict[str, AdapterFile | str] = {}
        if "diffusers" in wishes.formats:
            known_to_diffusers = json.dumps(_diffusers_metadata(wishes, config), sort_keys=True)
            named = {
                f"{part}.{own}": factors[name] for part, names in wishes.parts.items() for own, name in names.items()
            }
            files[ADAPTER_FILE] = AdapterFile(named, {**metadata, "lora_adapter_metadata": known_to_diffusers})
            files["adapter_config.json"] = json.dumps(config, indent=2)
        layout = wishes.names.layout
        if COMFYUI in wishes.formats and layout:
            kohya = layout.lora_to_kohya(factors, lambda module: scale, wishes.names.rows_of)
            files[f"adapter_model_{COMFYUI}.safetensors"] = AdapterFile(kohya, metadata)
        return files

    def updates(self, factors: Mapping[str, torch.Tensor]) -> dict[str, LowRankUpdate]:
        """One for each pair of factors."""
        modules = [name.removesuffix(A) for name in factors if name.endswith(A)]
        return {module: LowRankUpdate(factors[f"{module}{A}"], factors[f"{module}{B}"]) for module in modules}


KINDS = (Lora(),)


def _alpha(settings: LoraSettings) -> float:
    return settings.rank if settings.alpha is None else settings.alpha


def _from_kohya(file: AdapterFile, names: ModelNames) -> Tensors:
    """Factors whose own scale is 1."""
    if names.layout is None:
        raise UserError.of(
            "kohya's names are not known for this model; give the file in diffusers' layout", str(file.path)
        )
    try:
        return names.layout.lora_from_kohya(file.tensors, list(names.modules), names.rows_of)
    except ValueError as error:
        raise UserError.of(str(error), str(file.path)) from error


def _from_peft(file: AdapterFile, names: ModelNames) -> tuple[Tensors, dict[str, float]]:
    """Factors under the names of diffusers, PEFT or ComfyUI, and the scale of each `lora_B`."""
    # If several modules are trained together, our names begin with the folder too.
    several = any(module.startswith(f"{names.folder}.") for module in names.modules)
    folder = "" if several else f"{names.folder}."
    factors = {
        key.removeprefix(PEFT_PREFIX).removeprefix(folder).removeprefix("diffusion_model."): tensor
        for key, tensor in file.tensors.items()
    }
    modules = [name.removesuffix(".alpha") for name in factors if name.endswith(".alpha")]
    alphas = {module: factors.pop(f"{module}.alpha").item() for module in modules}
    common_alpha = _common_alpha(file)
    for own, other in ((B, A), (A, B)):
        alone = next((n for n in factors if n.endswith(own) and n.removesuffix(own) + other not in factors), None)
        if alone:
            missing = other.removesuffix(".weight").removeprefix(".")
            raise UserError.of(f"'{alone}' has no {missing} beside it; is the file whole?", str(file.path))
    return factors, {name: _scale(name, factors, alphas, common_alpha) for name in factors if name.endswith(B)}


def _common_alpha(file: AdapterFile) -> float | None:
    """The alpha of all modules, from the header, where diffusers keeps it, or from PEFT's configuration beside the
    file."""
    known = json.loads(file.metadata.get("lora_adapter_metadata", "{}"))
    config = file.path.with_name("adapter_config.json")
    if not known and config.is_file():
        known = read_json(config)
    return next((value for key, value in known.items() if key.split(".")[-1] == "lora_alpha"), None)


def _scale(name: str, factors: Tensors, alphas: Mapping[str, float], common_alpha: float | None) -> float:
    """alpha / rank of the module to which a `lora_B` belongs: with its own alpha, with that of all modules, or 1."""
    module = name.removesuffix(B)
    rank = factors[f"{module}{A}"].shape[0]
    return alphas.get(module, rank if common_alpha is None else common_alpha) / rank


def _diffusers_metadata(wishes: ExportWishes, config: Mapping[str, Any]) -> dict[str, object]:
    """The metadata of each part's adapter that diffusers reads."""
    known: dict[str, object] = {}
    for part, names in wishes.parts.items():
        # Without the prefix of CLIP's files, diffusers finds them in newer and older CLIPs.
        modules = [name.removeprefix("text_model.") for name in sorted({own.split(Lora.mark)[0] for own in names})]
        values = {**config, "target_modules": modules}
        if modules:
            keys = ("r", "lora_alpha", "lora_dropout", "bias", "target_modules")
            known |= {f"{part}.{key}": values[key] for key in keys}
    return known
