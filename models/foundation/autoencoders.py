"""Families of VAEs as encoders for the cache, and as decoders for samples.

Shapes: B batch, C channels, F frames, H W pixels, h w latent cells.
"""

from __future__ import annotations

import hashlib
from functools import cached_property
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
from einops import rearrange

from models.foundation.weights import assign, build_empty, fingerprint, load_tensors
from utils.dataset.buckets import Bucket
from utils.diffusion import seeds


def load_autoencoder_kl(folder: Path | None, file: Path | None, dtype: torch.dtype) -> AutoencoderKL:
    """An image VAE from a diffusers folder, its weights perhaps from a single file with diffusers' or original keys.

    Raises:
        SettingsError: the file holds no VAE that fits the folder's configuration.
    """
    if file is None or file.is_dir():
        return AutoencoderKL.from_pretrained(file or folder / "vae", torch_dtype=dtype)
    config = AutoencoderKL.load_config(folder / "vae")
    vae = build_empty(lambda: AutoencoderKL.from_config(config))
    tensors = load_tensors(file, dtype)
    if not tensors.keys() >= vae.state_dict().keys():
        tensors = convert_ldm_vae_checkpoint(tensors, config)
    assign(vae, tensors, file)
    return vae


class ImageAutoencoder:
    """An image VAE as an `Encoder`: pixels -> latents (z - shift) * scale.

    Args:
        folder: the diffusers folder with `vae/config.json`.
        file: weights that replace the folder's.
        dtype: in which it encodes.
        name: of its store; "control" reads the control image and takes the mode of the distribution.
        reads: what it encodes, "pixels" or "control".
    """

    def __init__(self, folder: Path, file: Path | None, dtype: torch.dtype, *, reads: str = "pixels", seed: int = 0):
        self.folder, self.file, self.dtype, self.seed = folder, file, dtype, seed
        self.name = "vae" if reads == "pixels" else "vae_control"
        self.reads = (reads,)
        self.output = "latents" if reads == "pixels" else "control_latents"
        self.vae: AutoencoderKL | None = None
        self.device = torch.device("cpu")

    @cached_property
    def fingerprint(self) -> str:
        draws = "mode" if self.reads == ("control",) else f"sample-{self.seed}"
        config = self.folder / "vae" / "config.json"
        weights = [self.file, config] if self.file else [self.folder / "vae"]
        return fingerprint("vae", draws, str(self.dtype), *weights)

    def load(self, device: torch.device) -> None:
        self.device = device
        self.vae = load_autoencoder_kl(self.folder, self.file, self.dtype).to(device).eval().requires_grad_(False)

    def unload(self) -> None:
        self.vae = None

    @torch.no_grad()
    def encode(self, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        """Latents (B, C, h, w) of `pixels_BCFHW` or `control_BCFHW` in [-1, 1], F = 1: the posterior's mode for a
        control image, as inference takes it, else a sample."""
        (pixels_BCFHW,) = inputs.values()
        pixels_BCHW = rearrange(pixels_BCFHW, "b c 1 h w -> b c h w").to(self.device, self.dtype)
        posterior = self.vae.encode(pixels_BCHW).latent_dist
        latents = posterior.mode()
        if self.reads == ("pixels",):
            latents = latents + posterior.std * self._noise(pixels_BCFHW, latents)
        config = self.vae.config
        return {self.output: (latents - (config.shift_factor or 0.0)) * config.scaling_factor}

    def _noise(self, pixels_BCFHW: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        """Normal noise that depends on the seed and each picture alone, not on the batch it is encoded in."""
        noise = torch.empty(latents.shape)
        for index, pixels in enumerate(pixels_BCFHW):
            picture = hashlib.blake2b(pixels.cpu().contiguous().numpy().tobytes(), digest_size=8).hexdigest()
            noise[index] = seeds.normal(latents.shape[1:], self.seed, "latents", picture)
        return noise.to(latents)

    @torch.no_grad()
    def decode(self, latents_BChw: torch.Tensor) -> torch.Tensor:
        """Pixels (B, C, 1, H, W) in [-1, 1]."""
        config = self.vae.config
        latents = latents_BChw.to(self.device, self.dtype) / config.scaling_factor + (config.shift_factor or 0.0)
        return rearrange(self.vae.decode(latents).sample.float(), "b c h w -> b c 1 h w").clamp(-1, 1)

    def feature_shapes(self, bucket: Bucket) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        config = AutoencoderKL.load_config(self.folder / "vae")
        cell = 2 ** (len(config["block_out_channels"]) - 1)
        return {self.output: ((config["latent_channels"], bucket.height // cell, bucket.width // cell), self.dtype)}
