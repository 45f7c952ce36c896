"""The VAEs of LTX-Video and LTX-2 as encoders for the cache, and as decoders for samples.

Shapes: B batch, C channels, F frames, H W pixels, f h w latent cells.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from models.foundation.encoders.vae import Family, Tensors
from models.foundation.encoders.video_vae import WanAutoencoder

PREFIX = "vae."
OF_LTX_23 = {".up_blocks.7.": ".up_blocks.3.upsamplers.0.", ".up_blocks.8.": ".up_blocks.3."}


def _from_ltx(tensors: Tensors, config: dict[str, Any]) -> Tensors:
    """Tensors with Lightricks' names, under diffusers' names."""
    from diffusers.loaders.single_file_utils import convert_ltx_vae_checkpoint_to_diffusers

    # The converter tells the versions apart by names with the prefix, which files of the VAE alone may lack.
    return convert_ltx_vae_checkpoint_to_diffusers(
        {name if name.startswith(PREFIX) else PREFIX + name: tensor for name, tensor in tensors.items()}
    )


def _from_ltx2(tensors: Tensors, config: dict[str, Any]) -> Tensors:
    """The same of LTX-2, and of LTX-2.3, whose decoder has a block more than the converter knows."""
    from diffusers.loaders.single_file_utils import convert_ltx2_vae_to_diffusers

    converted = convert_ltx2_vae_to_diffusers(tensors)
    for there, here in OF_LTX_23.items():
        converted = {name.replace(there, here): tensor for name, tensor in converted.items()}
    return converted


KEYS = ("latent_channels", "patch_size", "spatio_temporal_scaling", "timestep_conditioning")
LTX = Family("AutoencoderKLLTXVideo", KEYS, ".mid_block.", _from_ltx, prefix=PREFIX)
LTX2 = Family("AutoencoderKLLTX2Video", KEYS, ".mid_block.", _from_ltx2, prefix=PREFIX)


def compression_of(config: dict[str, Any]) -> tuple[int, int]:
    """How many pixels of a side, and how many frames after the first, a latent cell covers."""
    halvings = sum(config["spatio_temporal_scaling"])
    spatial = config.get("spatial_compression_ratio") or config["patch_size"] * 2**halvings
    temporal = config.get("temporal_compression_ratio") or config.get("patch_size_t", 1) * 2**halvings
    return spatial, temporal


def ltx_latent_size(config: dict[str, Any], width: int, height: int, frames: int) -> tuple[int, int, int, int]:
    """The shape (C, f, h, w) of a latent: its first frame is the clip's, each of the others covers several."""
    cell, group = compression_of(config)
    return config["latent_channels"], (frames - 1) // group + 1, height // cell, width // cell


class LTXAutoencoder(WanAutoencoder):
    """LTX-Video's VAE as an `Encoder`: pixels of pictures and clips -> latents (z - mean) scale / std, per channel."""

    family, latent_size = LTX, staticmethod(ltx_latent_size)

    def told(self, vae: nn.Module, latents: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Decoders that are told a time, as they also denoise, are told 0, as in the stock pipeline."""
        return (latents.new_zeros(len(latents)),) if vae.config.timestep_conditioning else ()

    def _statistics(self, frames: int) -> tuple[torch.Tensor, torch.Tensor]:
        values = (self.vae.latents_mean, self.vae.latents_std / self.vae.config.scaling_factor)
        mean, std = (value.to(self.device, self.dtype).view(-1, 1, 1, 1) for value in values)
        return mean, std


class LTX2Autoencoder(LTXAutoencoder):
    """LTX-2's VAE as an `Encoder`, like LTX-Video's."""

    family = LTX2
