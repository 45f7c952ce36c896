"""Models of still pictures with the latents of Qwen-Image's VAE, which have a dimension of frames.

Shapes: B batch, C channels, T tokens, h w latent cells.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange

from models.base import BasePipeline
from models.foundation.checkpoints.configs import stock_scheduler
from models.foundation.encoders.video_vae import QWEN_IMAGE, QwenImageAutoencoder, latent_size
from models.foundation.layers import patches
from models.foundation.layers.patches import PATCH
from utils.dataset.buckets import MediaFacts

if TYPE_CHECKING:
    from diffusers import FlowMatchEulerDiscreteScheduler


class QwenPicturePipeline(BasePipeline, ABC):
    """A model of still pictures whose tokens are 2 x 2 cells, and which samples with the Euler steps of flow
    matching."""

    media = MediaFacts(spatial=16, temporal=1, max_frames=1)

    def autoencoder(self, **further: Any) -> QwenImageAutoencoder:
        """The VAE; `further` as of its class, instead of what the options say."""
        options = self.options
        how = {"draw": options.latents, **further}
        return QwenImageAutoencoder(options.diffusers_path, options.vae_path, self.dtype, **how)

    def tokens(self, latent_shape: Sequence[int]) -> int:
        *_, height, width = latent_shape
        return (height // PATCH) * (width // PATCH)

    def latent_shape(self, width: int, height: int, frames: int = 1) -> tuple[int, ...]:
        return latent_size(self._vae_config, width, height, frames)

    def scheduler(self) -> FlowMatchEulerDiscreteScheduler:
        return stock_scheduler(self.options.diffusers_path, "FlowMatchEulerDiscreteScheduler")

    # Kept, as every micro-batch asks for it.
    @cached_property
    def _vae_config(self) -> dict[str, Any]:
        return QWEN_IMAGE.config(self.options.diffusers_path, self.options.vae_path)


def pack(x_BC1hw: torch.Tensor) -> torch.Tensor:
    """A latent of one frame as tokens of 2x2 cells (B, T, 4C)."""
    return patches.pack(x_BC1hw.squeeze(2))


def unpack(x_BTC: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """The inverse of `pack`, for a latent of `height` x `width` cells; several pictures follow one another, (B, C, f,
    h, w)."""
    x_BfTC = rearrange(x_BTC, "b (f t) c -> b f t c", t=(height // PATCH) * (width // PATCH))
    return torch.stack([patches.unpack(one_BTC, height, width) for one_BTC in x_BfTC.unbind(1)], dim=2)
