"""Flux.2's VAE, whose latents are patches of 2 x 2 cells, normalised by the running statistics of a batch norm.

Shapes: B batch, C channels, h w cells of the VAE, H W pixels.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any, ClassVar

import torch
from einops import rearrange

from models.foundation.checkpoints.headers import fingerprint
from models.foundation.encoders.vae import Family, ImageAutoencoder, Tensors, in_the_room_there_is, picture_noise
from models.foundation.layers.patches import SIDES
from utils.dataset.samples import Bucket

STATISTICS = "bn."
MOVED = {"encoder.quant_conv.": "quant_conv.", "decoder.post_quant_conv.": "post_quant_conv."}


def _from_publisher(tensors: Tensors, config: dict[str, Any]) -> Tensors:
    """The publisher's tensors under diffusers' names."""
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    renamed = {}
    for name, tensor in tensors.items():
        prefix = next((prefix for prefix in MOVED if name.startswith(prefix)), None)
        renamed[MOVED[prefix] + name.removeprefix(prefix) if prefix else name] = tensor
    statistics = {name: tensor for name, tensor in renamed.items() if name.startswith(STATISTICS)}
    return {**convert_ldm_vae_checkpoint(renamed, config), **statistics}


FLUX2_VAE = Family(
    "AutoencoderKLFlux2", ("block_out_channels", "latent_channels", "batch_norm_eps"), "down_blocks.", _from_publisher
)


class Flux2Autoencoder(ImageAutoencoder):
    """Pixels -> latents (B, 4C, h/2, w/2).

    Attributes:
        epsilon: is added to the variances; None for what the configuration says.
        order: of the channels of a patch, c of the VAE and p q the places of cells in it.
    """

    family: ClassVar[Family] = FLUX2_VAE
    epsilon: ClassVar[float | None] = None
    order: ClassVar[str] = "(c p q)"

    @cached_property
    def fingerprint(self) -> str:
        whole = super().fingerprint
        others = [str(self.epsilon)] if self.epsilon is not None else []
        others += [self.order] if self.order != Flux2Autoencoder.order else []
        return fingerprint(whole, *others) if others else whole

    @classmethod
    def cells_of(cls, latents: torch.Tensor) -> torch.Tensor:
        """The inverse of `patched`."""
        return rearrange(latents, f"b {cls.order} h w -> b c (h p) (w q)", **SIDES)

    @classmethod
    def patched(cls, cells_BChw: torch.Tensor) -> torch.Tensor:
        """Patches of 2 x 2 cells as one cell with four times the channels."""
        return rearrange(cells_BChw, f"b c (h p) (w q) -> b {cls.order} h w", **SIDES)

    @torch.no_grad()
    def encode(self, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        (pixels_BCFHW,) = inputs.values()
        pixels_BCHW = rearrange(pixels_BCFHW, "b c 1 h w -> b c h w").to(self.device, self.dtype)
        posterior = in_the_room_there_is(self.vae, "encode", pixels_BCHW).latent_dist
        latents = posterior.mode()
        if self.draw == "sample":
            latents = latents + posterior.std * picture_noise(pixels_BCFHW, latents)
        mean, std = self._statistics(latents)
        yielded = [(self.patched(latents) - mean) / std, self.patched(posterior.std) / std]
        return dict(zip(self.outputs, yielded, strict=False))

    @torch.no_grad()
    def decode(self, latents_BChw: torch.Tensor) -> torch.Tensor:
        latents = latents_BChw.to(self.device, self.dtype)
        mean, std = self._statistics(latents)
        pixels = in_the_room_there_is(self.vae, "decode", self.cells_of(latents * std + mean)).sample
        return rearrange(pixels.float(), "b c h w -> b c 1 h w").clamp(-1, 1)

    def feature_shapes(self, bucket: Bucket) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        shape = latent_shape(self.family.config(self.folder, self.file), bucket.width, bucket.height)
        return dict.fromkeys(self.outputs, (shape, self.dtype))

    def _statistics(self, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation of the patches (1, 4C, 1, 1)."""
        norm, epsilon = self.vae.bn, self.epsilon or self.vae.config.batch_norm_eps
        mean, variance = (rearrange(one, "c -> 1 c 1 1") for one in (norm.running_mean, norm.running_var))
        return mean.to(like), torch.sqrt(variance + epsilon).to(like)


def latent_shape(config: dict[str, Any], width: int, height: int) -> tuple[int, int, int]:
    """The shape of a picture's latent, without the batch."""
    side = 2 ** len(config["block_out_channels"])
    return 4 * config["latent_channels"], height // side, width // side
