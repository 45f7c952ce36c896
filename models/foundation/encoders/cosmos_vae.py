"""The tokenizer of Cosmos 1.0 as an encoder for the cache, and as a decoder for samples.

Shapes: B batch, C channels, F frames, H W pixels, f h w latent cells.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from models.foundation.encoders.vae import Family, Tensors
from models.foundation.encoders.video_vae import WanAutoencoder
from utils.dataset.samples import Bucket

SIGMA_DATA = 0.5
"""The standard deviation of the latents that the model is trained on."""
LEVELS = (256, 512, 512, 512)
"""The channels of the decoder, for which diffusers has a default."""


RENAMED = (
    (r"\.(down|up)\.(\d+)\.", r".\1_blocks.\2."),
    (r"\.block\.", ".resnets."),
    (r"\.(down|up)sample\.", r".\1samplers.0."),
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.0\.", ".mid_block.attentions.0."),
    (r"\.mid\.attn_1\.1\.", ".mid_block.temp_attentions.0."),
    (r"\.([qkv])\.conv3d\.", r".to_\1."),
    (r"\.proj_out\.conv3d\.", ".to_out.0."),
    (r"\.0\.conv3d\.", ".conv_s."),
    (r"\.1\.conv3d\.", ".conv_t."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"\.conv3d\.", "."),
)
"""Patterns of names in the publisher's file -> diffusers' names."""
COMPUTED = ("wavelets", "_arange", "patch_size_buffer", "latent_mean", "latent_std")
"""Ends of the names of what diffusers computes, or has in its configuration."""


def _from_nvidia(tensors: Tensors, config: dict[str, Any]) -> Tensors:
    """Tensors with NVIDIA's names, under diffusers' names. There the decoder's blocks are counted from the last."""
    last = len(config.get("decode_block_out_channels", LEVELS)) - 2
    renamed = {}
    for name, tensor in tensors.items():
        if name.endswith(COMPUTED):
            continue
        for there, here in RENAMED:
            name = re.sub(there, here, name)
        renamed[re.sub(r"(?<=\.up_blocks\.)\d+", lambda number: str(last - int(number[0])), name)] = tensor
    return renamed


COSMOS = Family(
    "AutoencoderKLCosmos",
    ("latent_channels", "spatial_compression_ratio", "temporal_compression_ratio"),
    "down_blocks.",
    _from_nvidia,
)


def cosmos_latent_size(config: dict[str, Any], width: int, height: int, frames: int) -> tuple[int, int, int, int]:
    """The shape (C, f, h, w) of a latent: its first frame is the clip's, each of the others covers several."""
    cell, group = config["spatial_compression_ratio"], config["temporal_compression_ratio"]
    return config["latent_channels"], (frames - 1) // group + 1, height // cell, width // cell


class CosmosAutoencoder(WanAutoencoder):
    """The tokenizer of Cosmos 1.0 as an `Encoder`: pixels of pictures and clips -> latents sigma_data (z - mean) / std,
    with mean and std of each channel and frame."""

    family, latent_size = COSMOS, staticmethod(cosmos_latent_size)

    def _spread(self, posterior: Any) -> torch.Tensor:
        # It makes latents, and no distribution of them.
        return torch.zeros_like(posterior.mode())

    def _statistics(self, frames: int) -> tuple[torch.Tensor, torch.Tensor]:
        config = self.vae.config
        channels = config.latent_channels
        known = [
            torch.full((channels, frames), plain) if config[key] is None else torch.tensor(config[key])
            for key, plain in (("latents_mean", 0.0), ("latents_std", 1.0))
        ]
        mean, std = (one.to(self.device, self.dtype).view(channels, -1, 1, 1)[:, :frames] for one in known)
        return mean, std / SIGMA_DATA


class CosmosFirstFrame(CosmosAutoencoder):
    """The same of a clip's first frame alone, which is the first frame of the clip's latent too. Yields
    `first_frame_latents` (B, C, 1, h, w)."""

    def __init__(self, folder: Path, file: Path | None, dtype: torch.dtype):
        super().__init__(folder, file, dtype, draw="mode")
        self.name, self.outputs = "vae_first_frame", ["first_frame_latents"]

    def encode(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Latents of `pixels_BCFHW` in [-1, 1]."""
        return super().encode(pixels=pixels[:, :, :1])

    def feature_shapes(self, bucket: Bucket) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        return super().feature_shapes(replace(bucket, frames=1))
