"""A whole tiny Wan 2.1 of a first and a last frame (FLF2V): as that of picture to video, with places for the tokens
that CLIP makes of two pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from einops import rearrange
from torch.nn import functional

from models.wan import WanPipeline
from tests.models import tiny_wan_i2v
from tests.models.tiny_wan_i2v import TEXT_TOKENS, VISION, VISION_TOKENS
from utils.diffusion.seeds import normal

STOCK, SIZES = tiny_wan_i2v.STOCK, tiny_wan_i2v.SIZES
pipeline, features = tiny_wan_i2v.pipeline, tiny_wan_i2v.features


def write_folder(folder: Path, **changes: Any) -> Path:
    return tiny_wan_i2v.write_folder(folder, **{"pos_embed_seq_len": 2 * VISION_TOKENS, **changes})


def features_of_pictures(latent_shape: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Random features of the first and last frames of a batch."""
    return {
        "first_frame_latents": normal((2, *latent_shape), 0, "first frame"),
        "clip_vision": normal((2, 2 * VISION_TOKENS, VISION["hidden_size"]), 0, "clip"),
    }


def whole(
    denoiser: WanTransformer3DModel, pipeline: WanPipeline, features: dict, x_t: torch.Tensor, t_B: torch.Tensor
) -> torch.Tensor:
    missing = TEXT_TOKENS - features["umt5"].shape[1]
    mask = torch.zeros(len(x_t), 4, *x_t.shape[2:])
    mask[:, :, 0] = 1
    # Of the four frames of the last latent frame only the last is given.
    mask[:, 3, -1] = 1
    return denoiser(
        torch.cat([x_t, mask, features["first_frame_latents"]], dim=1),
        t_B * 1000,
        functional.pad(features["umt5"], (0, 0, 0, missing)),
        rearrange(features["clip_vision"], "b (n l) d -> (b n) l d", n=2),
        return_dict=False,
    )[0]
