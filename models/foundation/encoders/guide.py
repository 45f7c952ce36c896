"""A clip that another clip follows, as a condition: encoded by the clip's VAE.

Shapes: B batch, C channels, F frames, H W pixels, f h w latent cells.
"""

from __future__ import annotations

from pathlib import Path

import torch

from models.foundation.encoders.video_vae import WanAutoencoder
from utils.dataset.encoders import GUIDE
from utils.dataset.samples import Bucket


class GuideAutoencoder(WanAutoencoder):
    """Wan's VAE as an `Encoder` of the clip that VACE follows. Yields `guide_latents`, modes of their distributions:
    what is kept of that clip, of which here is nothing, so that it is grey, then the whole clip, which is to be made
    anew."""

    def __init__(self, folder: Path, file: Path | None, dtype: torch.dtype):
        super().__init__(folder, file, dtype, draw="mode")
        self.name, self.reads, self.outputs = "vae_guide", (GUIDE,), ["guide_latents"]

    def encode(self, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        """Latents (B, 2 C, f, h, w) of clips BCFHW in [-1, 1]."""
        (guide_BCFHW,) = inputs.values()
        (kept_1Cfhw,) = super().encode(pixels=torch.zeros_like(guide_BCFHW[:1])).values()
        (anew_BCfhw,) = super().encode(pixels=guide_BCFHW).values()
        return {self.outputs[0]: torch.cat([kept_1Cfhw.expand_as(anew_BCfhw), anew_BCfhw], dim=1)}

    def feature_shapes(self, bucket: Bucket) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        return {
            name: ((2 * shape[0], *shape[1:]), dtype) for name, (shape, dtype) in super().feature_shapes(bucket).items()
        }
