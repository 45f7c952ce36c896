"""Tencent's VAEs as encoders for the cache, and as decoders for samples: their latents are z * scale.

Shapes: B batch, C channels, F frames, H W pixels, f h w latent cells.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from models.foundation.encoders.vae import Family, ImageAutoencoder, Tensors
from models.foundation.encoders.video_vae import WanAutoencoder
from utils.dataset.samples import Bucket

SIZES = ("latent_channels", "scaling_factor", "spatial_compression_ratio", "temporal_compression_ratio")


def _same(tensors: Tensors, config: dict[str, Any]) -> Tensors:
    """Tencent's names are those of diffusers."""
    return tensors


RENAMED = (
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.([qkv])\.", r".mid_block.attentions.0.to_\1."),
    (r"\.mid\.attn_1\.", ".mid_block.attentions.0."),
    (r"\.(down|up)\.(\d+)\.block\.", r".\1_blocks.\2.resnets."),
    (r"\.(down|up)\.(\d+)\.(down|up)sample\.", r".\1_blocks.\2.\3samplers.0."),
)
"""Patterns of names in the file of HunyuanVideo 1.5's VAE -> diffusers' names."""


def _from_tencent(tensors: Tensors, config: dict[str, Any]) -> Tensors:
    """Tensors with Tencent's names of HunyuanVideo 1.5's VAE, under diffusers' names."""
    renamed = {}
    for name, tensor in tensors.items():
        for there, here in RENAMED:
            name = re.sub(there, here, name)
        renamed[name] = tensor
    return renamed


HUNYUAN_VIDEO = Family("AutoencoderKLHunyuanVideo", SIZES, "down_blocks.", _same)
# The mask of its attention has no dimension for heads, so that one of several clips fits no query.
HUNYUAN_VIDEO_15 = Family("AutoencoderKLHunyuanVideo15", SIZES, "down_blocks.", _from_tencent, one_by_one=True)
HUNYUAN_IMAGE = Family(
    "AutoencoderKLHunyuanImage", ("block_out_channels", "latent_channels", "scaling_factor"), "down_blocks.", _same
)


def hunyuan_latent_size(config: dict, width: int, height: int, frames: int) -> tuple[int, int, int, int]:
    """The shape (C, f, h, w) of a latent: its first frame is the clip's, each of the others covers several."""
    cell, group = config["spatial_compression_ratio"], config["temporal_compression_ratio"]
    return config["latent_channels"], (frames - 1) // group + 1, height // cell, width // cell


class HunyuanVideoAutoencoder(WanAutoencoder):
    """HunyuanVideo's VAE as an `Encoder`: pixels of pictures and clips -> latents z * scale. From 17 frames on it
    encodes and decodes pieces that overlap in time, as in the stock pipeline."""

    family = HUNYUAN_VIDEO

    def feature_shapes(self, bucket: Bucket) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        config = self.family.config(self.folder, self.file)
        shape = hunyuan_latent_size(config, bucket.width, bucket.height, bucket.frames)
        return dict.fromkeys(self.outputs, (shape, self.dtype))

    def _statistics(self, frames: int) -> tuple[float, float]:
        # Numbers and not tensors: bfloat16 would round the scale by up to 0.2 %.
        return 0.0, 1.0 / self.vae.config.scaling_factor


class HunyuanFirstFrame(HunyuanVideoAutoencoder):
    """The same of a clip's first frame alone, which is the first frame of the clip's latent too. Yields
    `first_frame_latents` (B, C, 1, h, w), the mode of their distribution."""

    def __init__(self, folder: Path, file: Path | None, dtype: torch.dtype):
        super().__init__(folder, file, dtype, draw="mode")
        self.name, self.outputs = "vae_first_frame", ["first_frame_latents"]

    def encode(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Latents of `pixels_BCFHW` in [-1, 1]."""
        return super().encode(pixels=pixels[:, :, :1])

    def feature_shapes(self, bucket: Bucket) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        return super().feature_shapes(replace(bucket, frames=1))


class HunyuanVideo15Autoencoder(HunyuanVideoAutoencoder):
    """HunyuanVideo 1.5's VAE as an `Encoder`, which takes a clip in one piece: pixels of pictures and clips -> latents
    z * scale."""

    family = HUNYUAN_VIDEO_15


class HunyuanVideo15FirstFrame(HunyuanFirstFrame):
    """`HunyuanFirstFrame` of HunyuanVideo 1.5."""

    family = HUNYUAN_VIDEO_15


class HunyuanImageAutoencoder(ImageAutoencoder):
    """HunyuanImage's VAE as an `Encoder`: pixels of a picture -> latents z * scale, of cells of 32 x 32 pixels."""

    family = HUNYUAN_IMAGE
