"""A whole tiny Flux in diffusers' layout: the examples' miniature with a transformer and a scheduler of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel

from models.flux import FluxOptions, FluxPipeline
from utils.diffusion.seeds import normal
from utils.settings.schema import AdapterSettings, Settings

MINI_FLUX = Path(__file__).resolve().parents[2] / "examples" / "mini_flux"
TEXT_TOKENS = 16
CONFIG = {
    "patch_size": 1,
    "in_channels": 16,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 64,
    "pooled_projection_dim": 32,
    "guidance_embeds": True,
    "axes_dims_rope": [4, 4, 8],
}


def transformer(**changes: Any) -> FluxTransformer2DModel:
    """Random weights, those of the norms too: with ones, a query's norm could stand for a key's."""
    torch.manual_seed(0)
    denoiser = FluxTransformer2DModel(**{**CONFIG, **changes})
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return denoiser


def write_folder(place: Path, *, scheduler: dict[str, Any] | None = None, **changes: Any) -> Path:
    """A diffusers folder with this transformer and scheduler; the other parts are the miniature's own."""
    for part in (
        *(MINI_FLUX / name for name in ("model_index.json", "vae")),
        *MINI_FLUX.glob("t*_encoder*"),
        *MINI_FLUX.glob("tokenizer*"),
    ):
        (place / part.name).symlink_to(part)
    transformer(**changes).save_pretrained(place / "transformer")
    FlowMatchEulerDiscreteScheduler(**(scheduler or {})).save_pretrained(place / "scheduler")
    return place


def pipeline(folder: Path, **options: Any) -> FluxPipeline:
    options = {"dtype": "float32", "max_sequence_length": TEXT_TOKENS, **options}
    return FluxPipeline(FluxOptions(type="flux", diffusers_path=folder, **options), seed=0)


def settings(flux: FluxPipeline, adapter: AdapterSettings | None = None, **keys: Any) -> Settings:
    """A run's settings that train this model."""
    return Settings(
        output_dir=Path("runs"),
        dataset=Path("dataset.toml"),
        model=flux.options,
        adapter=adapter,
        optimizer={"type": "adamw", "lr": 1e-3},
        **keys,
    )


def features(lengths: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Random text features; they have all the same number of tokens."""
    return {
        "t5": normal((len(lengths), TEXT_TOKENS, 64), 0, "text", *lengths),
        "clip_pooled": normal((len(lengths), 32), 0, "pooled", *lengths),
    }
