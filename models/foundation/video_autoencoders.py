"""Video VAEs as encoders for the cache, and as decoders for samples.

Shapes: B batch, C channels, F frames, H W pixels, f h w latent cells.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

from models.foundation.autoencoders import ImageAutoencoder, picture_noise
from models.foundation.files import read_config
from models.foundation.weights import assign, build_empty, load_tensors, promised_tensors
from utils.dataset.samples import Bucket

WAN_KEYS = ("z_dim", "latents_mean", "latents_std")


def wan_vae_config(folder: Path, file: Path | None) -> dict:
    """The configuration of Wan's VAE: that of a diffusers folder, unless `file` is a folder with its own.

    Raises:
        SettingsError: it is missing, damaged, or another model's.
    """
    own = file is not None and (file / "config.json").is_file()
    return read_config(file if own else folder / "vae", model="AutoencoderKLWan", keys=WAN_KEYS)


def load_wan_vae(
    folder: Path,
    file: Path | None,
    dtype: torch.dtype,
    read: Callable[[Path, torch.dtype], dict[str, torch.Tensor]] = load_tensors,
) -> AutoencoderKLWan:
    """Wan's VAE from a diffusers folder, its weights perhaps from elsewhere, with diffusers' or original names.

    Raises:
        SettingsError: the file holds no VAE that fits the configuration.
    """
    config = wan_vae_config(folder, file)
    vae, source = build_empty(lambda: AutoencoderKLWan.from_config(config)), file or folder / "vae"
    tensors = read(source, dtype)
    if not any("up_blocks." in name for name in tensors):
        tensors = convert_wan_vae_to_diffusers(tensors)
    assign(vae, tensors, source)
    return vae


def latent_size(config: dict, width: int, height: int, frames: int) -> tuple[int, int, int, int]:
    """The shape (C, f, h, w) of a latent: its first frame is the clip's, each of the others stands for several."""
    cell, group = config.get("scale_factor_spatial", 8), config.get("scale_factor_temporal", 4)
    return config["z_dim"], (frames - 1) // group + 1, height // cell, width // cell


class WanAutoencoder(ImageAutoencoder):
    """Wan's VAE as an `Encoder`: pixels of pictures and clips -> latents (z - mean) / std, by channel."""

    vae: AutoencoderKLWan | None

    def check(self) -> None:
        load_wan_vae(self.folder, self.file, self.dtype, promised_tensors)

    def load(self, device: torch.device) -> None:
        self.device = device
        self.vae = load_wan_vae(self.folder, self.file, self.dtype).to(device).eval().requires_grad_(False)

    @torch.no_grad()
    def encode(self, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        """Latents (B, C, f, h, w) of `pixels_BCFHW` or `control_BCFHW` in [-1, 1], as `draw` says."""
        (pixels_BCFHW,) = inputs.values()
        posterior = self.vae.encode(pixels_BCFHW.to(self.device, self.dtype)).latent_dist
        mean, std = self._statistics()
        latents = posterior.mode()
        if self.draw == "sample":
            latents = latents + posterior.std * picture_noise(pixels_BCFHW, latents)
        yielded = [(latents - mean) / std, posterior.std / std]
        return dict(zip(self.outputs, yielded, strict=False))

    @torch.no_grad()
    def decode(self, latents_BCfhw: torch.Tensor) -> torch.Tensor:
        """Pixels (B, C, F, H, W) in [-1, 1]."""
        mean, std = self._statistics()
        latents = latents_BCfhw.to(self.device, self.dtype) * std + mean
        return self.vae.decode(latents).sample.float().clamp(-1, 1)

    def feature_shapes(self, bucket: Bucket) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        config = wan_vae_config(self.folder, self.file)
        shape = latent_size(config, bucket.width, bucket.height, bucket.frames)
        return dict.fromkeys(self.outputs, (shape, self.dtype))

    def _statistics(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation of each channel, (C, 1, 1, 1)."""
        config = self.vae.config
        values = (torch.tensor(config[name]) for name in ("latents_mean", "latents_std"))
        mean, std = (value.to(self.device, self.dtype).view(-1, 1, 1, 1) for value in values)
        return mean, std
