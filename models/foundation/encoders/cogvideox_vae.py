"""CogVideoX's VAE as an encoder for the cache, and as a decoder for samples: its latents are z * scale.

Shapes: B batch, C channels, F frames, H W pixels, f h w latent cells.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from models.foundation.checkpoints.headers import fingerprint
from models.foundation.encoders.vae import NOISE_SEED, Family, Tensors, content_of
from models.foundation.encoders.video_vae import WanAutoencoder
from utils.dataset.samples import Bucket
from utils.diffusion import seeds

KEYS = ("block_out_channels", "latent_channels", "scaling_factor", "temporal_compression_ratio")
RENAMED = {
    "down.": "down_blocks.",
    "up.": "up_blocks.",
    "block.": "resnets.",
    "downsample.": "downsamplers.0.",
    "upsample.": "upsamplers.0.",
    "mid.block_1.": "mid_block.resnets.0.",
    "mid.block_2.": "mid_block.resnets.1.",
    "nin_shortcut.": "conv_shortcut.",
}
"""Parts of names in the publisher's files, each at the beginning or behind a dot -> diffusers' names."""
LOG_STRENGTH, LOG_STRENGTH_SPREAD = -3.0, 0.5
"""Mean and standard deviation of the logarithm of the strength of the noise on a first frame, whose colours lie in
[-1, 1]: CogVideo, finetune/models/cogvideox_i2v."""


def _from_publisher(tensors: Tensors, config: dict[str, Any]) -> Tensors:
    """Tensors with the publisher's names, who counts the decoder's blocks from the pixels, under diffusers' names."""
    last, renamed = len(config["block_out_channels"]) - 1, {}
    for name, tensor in tensors.items():
        parts = f".{name}"
        for there, here in RENAMED.items():
            parts = parts.replace(f".{there}", f".{here}")
        parts = parts.removeprefix(".").split(".")
        if parts[:2] == ["decoder", "up_blocks"] and parts[2].isdigit():
            parts[2] = str(last - int(parts[2]))
        # What only the training of the VAE needed.
        if parts[0] != "loss":
            renamed[".".join(parts)] = tensor
    return renamed


COGVIDEOX = Family("AutoencoderKLCogVideoX", KEYS, "down_blocks.", _from_publisher)


def compression_of(config: dict[str, Any]) -> tuple[int, int]:
    """How many pixels of a side, and how many frames after the first, a latent cell covers."""
    return 2 ** (len(config["block_out_channels"]) - 1), int(config["temporal_compression_ratio"])


def cogvideox_latent_size(config: dict[str, Any], width: int, height: int, frames: int) -> tuple[int, int, int, int]:
    """The shape (C, f, h, w) of a latent: its first frame is the clip's, each of the others covers several."""
    cell, group = compression_of(config)
    return config["latent_channels"], (frames - 1) // group + 1, height // cell, width // cell


class CogVideoXAutoencoder(WanAutoencoder):
    """CogVideoX's VAE as an `Encoder`: pixels of pictures and clips -> latents z * scale.

    Args:
        leading: so many copies of the latent's first frame come before it, for models that see several frames
            together. They are no part of the clip.
    """

    family, latent_size = COGVIDEOX, staticmethod(cogvideox_latent_size)

    def __init__(self, *files: Any, leading: int = 0, **named: Any):
        super().__init__(*files, **named)
        self.leading = leading

    @cached_property
    def fingerprint(self) -> str:
        of_vae = super().fingerprint
        return fingerprint("leading", str(self.leading), of_vae) if self.leading else of_vae

    def encode(self, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        """Latents (B, C, leading + f, h, w) of `pixels_BCFHW` in [-1, 1], as `draw` says."""
        return {name: self._led(latents) for name, latents in super().encode(**inputs).items()}

    def _led(self, latents_BCfhw: torch.Tensor) -> torch.Tensor:
        return torch.cat([latents_BCfhw[:, :, :1]] * self.leading + [latents_BCfhw], dim=2)

    def decode(self, latents_BCfhw: torch.Tensor) -> torch.Tensor:
        """Pixels (B, C, F, H, W) in [-1, 1]."""
        return super().decode(latents_BCfhw[:, :, self.leading :])

    def feature_shapes(self, bucket: Bucket) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        shapes = super().feature_shapes(bucket).items()
        return {name: ((shape[0], self.leading + shape[1], *shape[2:]), dtype) for name, (shape, dtype) in shapes}

    @property
    def scale(self) -> float:
        """The factor on latents."""
        return self.vae.config.scaling_factor

    def _statistics(self, frames: int) -> tuple[float, float]:
        # Numbers and not tensors: bfloat16 would round the scale by up to 0.2 %.
        return 0.0, 1.0 / self.scale


class CogVideoXFirstFrame(CogVideoXAutoencoder):
    """The same of a clip's first frame by itself: `first_frame_latents` (B, C, 1, h, w), the mode of their
    distribution.

    Args:
        noised: it yields `noised_first_frame_latents` too, of that frame with a noise that is always the same for a
            frame, whose strength is drawn from a log-normal distribution.
    """

    def __init__(self, folder: Path, file: Path | None, dtype: torch.dtype, *, noised: bool):
        super().__init__(folder, file, dtype, draw="mode")
        self.noised = noised
        self.name = "vae_first_frame"
        self.outputs = ["first_frame_latents", *(["noised_first_frame_latents"] if noised else [])]

    @cached_property
    def fingerprint(self) -> str:
        of_vae = super().fingerprint
        return fingerprint("first frame with noise", of_vae) if self.noised else of_vae

    def encode(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Latents of the first frames of `pixels_BCFHW` in [-1, 1]."""
        first = pixels[:, :, :1]
        seen = [first, with_noise(first)] if self.noised else [first]
        return {name: self._mode(one) for name, one in zip(self.outputs, seen, strict=True)}

    def _mode(self, pixels: torch.Tensor) -> torch.Tensor:
        return super().encode(pixels=pixels)[self.outputs[0]]

    def feature_shapes(self, bucket: Bucket) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        return super().feature_shapes(replace(bucket, frames=1))

    @property
    def scale(self) -> float:
        """CogVideoX 1.5 was trained with first frames that were divided by what others are multiplied with, which its
        VAE's configuration notes (`invert_scale_latents`)."""
        config = self.vae.config
        return 1.0 / config.scaling_factor if config.invert_scale_latents else config.scaling_factor


def with_noise(pixels: torch.Tensor) -> torch.Tensor:
    """Pixels (B, ...) with normal noise that depends only on each one's content."""
    noisy = pixels.clone()
    for index, one in enumerate(pixels):
        content = content_of(one)
        spread = LOG_STRENGTH_SPREAD * seeds.normal((1,), NOISE_SEED, "strength on picture", content).item()
        noise = seeds.normal(tuple(one.shape), NOISE_SEED, "noise on picture", content).to(pixels)
        noisy[index] += math.exp(LOG_STRENGTH + spread) * noise
    return noisy
