"""A whole tiny Wan 2.2 A14B of picture to video: as that of 2.1, without CLIP."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.models import tiny_wan_i2v
from tests.models.tiny_wan_i2v import (  # noqa: F401
    SAMPLING,
    SIZES,
    STOCK,
    draw,
    features,
    pipeline,
    prompt_features,
    stock_latents,
    whole,
)


def write_folder(folder: Path) -> Path:
    return tiny_wan_i2v.write_folder(folder, seen=False)


def features_of_pictures(latent_shape: tuple[int, ...], batch: int = 2) -> dict[str, torch.Tensor]:
    made = tiny_wan_i2v.features_of_pictures(latent_shape, batch)
    return {"first_frame_latents": made["first_frame_latents"]}
