"""Video VAEs as encoders for the cache, and as decoders for samples.

Shapes: B batch, C channels, F frames, H W pixels, f h w latent cells.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch

from models.foundation.encoders.vae import Family, ImageAutoencoder, Tensors, in_the_room_there_is, picture_noise
from utils.dataset.inputs import with_opacity
from utils.dataset.samples import Bucket

STATISTICS = ("z_dim", "latents_mean", "latents_std")


def _from_wan(tensors: Tensors, config: dict[str, Any]) -> Tensors:
    """Tensors with the original names of Wan's VAE, under diffusers' names."""
    from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

    return convert_wan_vae_to_diffusers(tensors)


WAN = Family("AutoencoderKLWan", STATISTICS, "up_blocks.", _from_wan)
# Qwen-Image's VAE is Wan's VAE with further training.
QWEN_IMAGE = Family("AutoencoderKLQwenImage", STATISTICS, "up_blocks.", _from_wan)
QWEN_IMAGE_21 = Family("AutoencoderKLQwenImage21", STATISTICS, "up_blocks.", lambda tensors, config: tensors)
wan_vae_config = WAN.config


def latent_size(config: dict, width: int, height: int, frames: int) -> tuple[int, int, int, int]:
    """The shape (C, f, h, w) of a latent: its first frame is the clip's, each of the others covers several."""
    cell, group = config.get("scale_factor_spatial", 8), config.get("scale_factor_temporal", 4)
    return config["z_dim"], (frames - 1) // group + 1, height // cell, width // cell


class WanAutoencoder(ImageAutoencoder):
    """Wan's VAE as an `Encoder`: pixels of pictures and clips -> latents (z - mean) / std, per channel.

    Attributes:
        latent_size: (configuration, width, height, frames) -> the shape of a latent.
    """

    family = WAN
    latent_size: ClassVar[Callable[..., tuple[int, ...]]] = staticmethod(latent_size)

    @torch.no_grad()
    def encode(self, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        """Latents (B, C, f, h, w) of `pixels_BCFHW` or `control_BCFHW` in [-1, 1], as `draw` says."""
        (pixels_BCFHW,) = inputs.values()
        pixels = pixels_BCFHW.to(self.device, self.dtype)
        posterior = in_the_room_there_is(self.vae, "encode", pixels).latent_dist
        latents, spread = posterior.mode(), self._spread(posterior)
        mean, std = self._statistics(latents.shape[2])
        if self.draw == "sample":
            latents = latents + spread * picture_noise(pixels_BCFHW, latents)
        yielded = [(latents - mean) / std, spread / std]
        return dict(zip(self.outputs, yielded, strict=False))

    @torch.no_grad()
    def decode(self, latents_BCfhw: torch.Tensor) -> torch.Tensor:
        """Pixels (B, C, F, H, W) in [-1, 1]."""
        mean, std = self._statistics(latents_BCfhw.shape[2])
        latents = latents_BCfhw.to(self.device, self.dtype) * std + mean
        return (
            in_the_room_there_is(self.vae, "decode", latents, *self.told(self.vae, latents)).sample.float().clamp(-1, 1)
        )

    def feature_shapes(self, bucket: Bucket) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        config = self.family.config(self.folder, self.file)
        shape = self.latent_size(config, bucket.width, bucket.height, bucket.frames)
        return dict.fromkeys(self.outputs, (shape, self.dtype))

    def _spread(self, posterior: Any) -> torch.Tensor:
        """The standard deviation of a distribution of latents."""
        return posterior.std

    def _statistics(self, frames: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation of each channel, (C, 1, 1, 1), or of each of this many latent frames too."""
        config = self.vae.config
        values = (torch.tensor(config[name]) for name in ("latents_mean", "latents_std"))
        mean, std = (value.to(self.device, self.dtype).view(-1, 1, 1, 1) for value in values)
        return mean, std


class QwenImageAutoencoder(WanAutoencoder):
    """Qwen-Image's VAE as an `Encoder`: like Wan's, with latents (B, C, 1, h, w) for a picture."""

    family = QWEN_IMAGE


class QwenImage21Autoencoder(WanAutoencoder):
    """Qwen-Image 2.1's VAE as an `Encoder` of pictures, or of control images, with their opacity (B, 4, 1, H, W), in
    latents (B, C, 1, h, w) of cells of 16 x 16 pixels."""

    family = QWEN_IMAGE_21

    def __init__(self, *others: Any, **named: Any):
        super().__init__(*others, **named)
        (read,) = self.reads
        self.reads = ("rgba" if read == "pixels" else with_opacity(read),)

    def decode(self, latents_BC1hw: torch.Tensor) -> torch.Tensor:
        """Pixels (B, 3, 1, H, W) in [-1, 1], on grey."""
        return on_grey(super().decode(latents_BC1hw))


def on_grey(pixels_B4FHW: torch.Tensor) -> torch.Tensor:
    """The colours (B, 3, F, H, W) in [-1, 1] of pixels with their opacity, before a grey ground."""
    colours, opacity = pixels_B4FHW.split([3, 1], dim=1)
    return colours * (opacity + 1) / 2
