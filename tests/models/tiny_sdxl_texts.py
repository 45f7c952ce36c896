"""The tiny SDXL with both text encoders trained: features are tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from models.foundation.layers.ensemble import Ensemble
from models.sdxl import SdxlPipeline
from tests.models import tiny_sdxl
from tests.models.tiny_sdxl import SAMPLING, STOCK, draw, stock_latents, write_folder

__all__ = ["SAMPLING", "STOCK", "draw", "stock_latents", "write_folder"]

RATES = {"unet_lr": 1e-2, "text_encoder_1_lr": 5e-3, "text_encoder_2_lr": 2e-3}
ENDS, WORDS = 1216, 1200
TEXTS = ("clip_l", "clip_g")


def pipeline(folder: Path, **options: Any) -> SdxlPipeline:
    return tiny_sdxl.pipeline(folder, **{**RATES, **options})


def features(lengths: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Tokens of texts of these lengths."""
    draw = torch.Generator().manual_seed(sum(lengths))
    sizes = {"size_ids": tiny_sdxl.features(lengths)["size_ids"]}
    tokens = {}
    for name in TEXTS:
        tokens[f"{name}_tokens"] = torch.full((len(lengths), 77), ENDS)
        for row, length in zip(tokens[f"{name}_tokens"], lengths, strict=True):
            row[:length] = torch.randint(WORDS, (length,), generator=draw)
        tokens[f"{name}_weights"] = torch.ones(len(lengths), 77)
    return {**tokens, **sizes}


def whole(
    denoiser: Ensemble, pipeline: SdxlPipeline, features: dict, x_t: torch.Tensor, t_B: torch.Tensor
) -> torch.Tensor:
    """As the stock pipeline's `encode_prompt` calls the encoders, which may be its own."""
    made = {}
    for name, part in zip(TEXTS, (denoiser.text_encoder, denoiser.text_encoder_2), strict=True):
        output = part(features[f"{name}_tokens"], output_hidden_states=True)
        made[name] = output.hidden_states[-2]
    made["clip_g_pooled"] = output[0]
    return tiny_sdxl.whole(denoiser, pipeline, {**features, **made}, x_t, t_B)
