"""What tests of other programs' adapters share: models without weights, and small adapters in any spelling."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from models.assembly.stage import model_names
from models.foundation.checkpoints.adapter_files import read_updates
from models.foundation.checkpoints.key_layouts import KeyLayout
from tests.models.tiny_folder import tiny
from utils.adapters import attach, presets
from utils.adapters.kinds import ModelNames, Update
from utils.diffusion.seeds import normal

Tensors = dict[str, torch.Tensor]
RANK = 2
DOTTED = ("", "transformer.", "unet.", "diffusion_model.", "model.diffusion_model.", "base_model.model.")
UNDERSCORED = ("lora_unet_", "lora_unet__", "lora_transformer_", "lycoris_")
ENDINGS = {
    "peft": (".lora_A.weight", ".lora_B.weight"),
    "peft_default": (".lora_A.default.weight", ".lora_B.default.weight"),
    "mochi": (".lora_A", ".lora_B"),
    "kohya": (".lora_down.weight", ".lora_up.weight"),
    "older": (".lora.down.weight", ".lora.up.weight"),
    "processors": ("_lora.down.weight", "_lora.up.weight"),
    "linear_layer": (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
}
SHARED_NAMES = [
    {"cosmos", "cosmos_predict2"},
    {"cosmos", "cosmos_predict25"},
    {"cosmos_predict2", "cosmos_predict25"},
    {"flux", "chroma"},
    {"flux", "hunyuan_video"},
    {"chroma", "hunyuan_video"},
    {"hunyuan_image", "hunyuan_video"},
    *({"framepack", other} for other in ("chroma", "flux", "hunyuan_image", "hunyuan_video")),
    {"ltx2", "ltx_video"},
    {"qwen_image", "qwen_image_layered"},
    {"sd15", "sdxl"},
    # A LoRA of Wan is for the blocks that VACE has too.
    {"wan", "wan_vace"},
]
"""Types whose modules are called alike, and in these tiny models may be of the same size."""


class Known(NamedTuple):
    """A model, still without weights."""

    denoiser: nn.Module
    names: ModelNames
    blocks: tuple[str, ...]

    @property
    def layout(self) -> KeyLayout | None:
        return self.names.layout

    def linears(self) -> list[str]:
        """What is adapted by default."""
        found = self.names.modules.items()
        return [name for name, m in found if isinstance(m, nn.Linear) and attach.is_within(name, self.blocks)]

    def own(self, module: str) -> str:
        return module.removeprefix(f"{self.names.folder}.") if self.names.has_parts else module

    def read(self, tensors: Tensors, place: Path, metadata: Mapping[str, str] | None = None) -> Mapping[str, Update]:
        save_file(tensors, place / "adapter.safetensors", dict(metadata or {}))
        return self.read_file(place / "adapter.safetensors")

    def read_file(self, file: Path) -> Mapping[str, Update]:
        updates = read_updates(file, self.names)
        presets.check_fits(self.denoiser, updates, "")
        return updates

    def deltas(self, tensors: Tensors, place: Path) -> Tensors:
        updates = self.read(tensors, place)
        return {name: update.delta(torch.zeros(update.shape)) for name, update in updates.items()}


def known_models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Known]:
    made: dict[str, Known] = {}

    def find(name: str) -> Known:
        if name not in made:
            module = tiny(name)
            pipeline = module.pipeline(module.write_folder(tmp_path_factory.mktemp(name)))
            denoiser = pipeline.weights.build_empty()
            made[name] = Known(denoiser, model_names(pipeline, denoiser), tuple(pipeline.blocks))
        return made[name]

    return find


def pair(name: str, shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    return normal((RANK, *shape[1:]), 0, name, "down"), normal((shape[0], RANK), 0, name, "up")


def lora(name: str, shape: tuple[int, ...], endings: tuple[str, str], alpha: float | None = None) -> Tensors:
    down, up = pair(name, shape)
    scale = {} if alpha is None else {f"{name}.alpha": torch.tensor(alpha)}
    return {f"{name}{endings[0]}": down, f"{name}{endings[1]}": up, **scale}


def spelled(prefix: str, name: str) -> str:
    return prefix + (name.replace(".", "_") if prefix in UNDERSCORED else name)


def product(name: str, shape: tuple[int, ...], scale: float = 1.0) -> torch.Tensor:
    down, up = pair(name, shape)
    return scale * up @ down
