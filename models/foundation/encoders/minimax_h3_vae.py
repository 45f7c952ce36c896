"""The VAE of MiniMax-H3 as an encoder for the cache, and as a decoder for samples.

It goes through clips in pieces, of which the last latent frames of each one but the first overlap with the next piece:
17 n + 5 frames are 5 n + 2 latent frames, and a picture is one.

Shapes: B batch, C channels, F frames, H W pixels, f h w latent cells.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from models.foundation.encoders.vae import Family, Tensors, in_the_room_there_is
from models.foundation.encoders.video_vae import WanAutoencoder

PIXEL_MEAN, PIXEL_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of red, green and blue in [0, 1], as in ImageNet: the VAE takes and gives pixels in these units."""


def _same(tensors: Tensors, config: dict[str, Any]) -> Tensors:
    """Other names than diffusers' are not known."""
    return tensors


MINIMAX_H3 = Family(
    "AutoencoderKLMiniMaxH3",
    (
        "clip_length",
        "latent_channels",
        "latents_mean",
        "latents_std",
        "spatial_downsample_factors",
        "temporal_downsample_factors",
        "token_drop",
    ),
    "post_quant_conv.",
    _same,
)


def cell_of(config: dict[str, Any]) -> int:
    """How many pixels of a side a latent cell covers."""
    return math.prod(config["spatial_downsample_factors"])


def pieces_of(config: dict[str, Any]) -> tuple[int, int]:
    """The frames of a piece, and how many more a clip of pieces has."""
    group, frames = math.prod(config["temporal_downsample_factors"]), config["clip_length"]
    missing = -frames % group
    kept = -config["token_drop"] % ((frames + missing) // group)
    return frames, max(kept * group - missing, 0)


def minimax_h3_latent_size(config: dict[str, Any], width: int, height: int, frames: int) -> tuple[int, int, int, int]:
    """The shape (C, f, h, w) of a latent."""
    cell, group, piece = cell_of(config), math.prod(config["temporal_downsample_factors"]), config["clip_length"]
    latent_frames = 1
    if frames > 1:
        latent_frames = math.ceil(frames / piece) * math.ceil(piece / group) - config["token_drop"]
    return config["latent_channels"], latent_frames, height // cell, width // cell


class MiniMaxH3Autoencoder(WanAutoencoder):
    """The VAE of MiniMax-H3 as an `Encoder`: pixels of pictures and clips -> latents (z - mean) / std, per channel. It
    computes in float32 whatever `dtype` is, as in the stock pipeline, and in tiles of 256 x 256 pixels, in which it was
    published: what it would make of larger ones differs."""

    family, latent_size = MINIMAX_H3, staticmethod(minimax_h3_latent_size)

    def __init__(self, folder: Path, file: Path | None, dtype: torch.dtype, **how: Any):
        super().__init__(folder, file, torch.float32, **how)

    def encode(self, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        """Latents (B, C, f, h, w) of `pixels_BCFHW` in [-1, 1], as `draw` says."""
        mean, std = self._of_pixels(torch.device("cpu"))
        return super().encode(**{name: ((pixels + 1) / 2 - mean) / std for name, pixels in inputs.items()})

    @torch.no_grad()
    def decode(self, latents_BCfhw: torch.Tensor) -> torch.Tensor:
        """Pixels (B, C, F, H, W) in [-1, 1]."""
        mean, std = self._statistics(latents_BCfhw.shape[2])
        pixels = in_the_room_there_is(self.vae, "decode", latents_BCfhw.to(self.device, self.dtype) * std + mean).sample
        mean, std = self._of_pixels(self.device)
        return ((pixels * std + mean) * 2 - 1).clamp(-1, 1)

    def _of_pixels(self, device: torch.device) -> tuple[torch.Tensor, ...]:
        return tuple(torch.tensor(values, device=device).view(-1, 1, 1, 1) for values in (PIXEL_MEAN, PIXEL_STD))
