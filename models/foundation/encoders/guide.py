"""What VACE is given, and in part makes: a clip to follow, and reference pictures that lead it; encoded by the clip's
VAE.

Of several references the last is the first in time, as in inference.

Shapes: B batch, C channels, F frames, H W pixels, R references, f h w latent cells; T = R + f.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from models.foundation.encoders.video_vae import WanAutoencoder
from utils.dataset.encoders import GUIDE
from utils.dataset.samples import Bucket

Shapes = dict[str, tuple[tuple[int, ...], torch.dtype]]


class LedAutoencoder(WanAutoencoder):
    """Wan's VAE as an `Encoder` of a clip with reference pictures before it, each a latent frame of its own.

    Args:
        references: the inputs that are the references.
        others, named: as of `WanAutoencoder`.
    """

    def __init__(self, *others: Any, references: tuple[str, ...], **named: Any):
        super().__init__(*others, **named)
        self.leading, self.reads = len(references), (*self.reads, *references)
        self.name = f"{self.name}_led"

    def encode(self, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        """Latents (B, C, T, h, w) of clips BCFHW and pictures BC1HW in [-1, 1]."""
        encode = super().encode
        clip, *references = (encode(pixels=inputs[name]) for name in self.reads)
        return {name: torch.cat([one[name] for one in (*references[::-1], clip)], dim=2) for name in self.outputs}

    def decode(self, latents_BCThw: torch.Tensor) -> torch.Tensor:
        """Pixels (B, C, F, H, W) in [-1, 1] of the clip alone."""
        return super().decode(latents_BCThw[:, :, self.leading :])

    def feature_shapes(self, bucket: Bucket) -> Shapes:
        return {
            name: (_longer(shape, self.leading), kind) for name, (shape, kind) in super().feature_shapes(bucket).items()
        }


class GuideAutoencoder(WanAutoencoder):
    """Wan's VAE as an `Encoder` of the clip that VACE follows, and of references before it. Yields `guide_latents`,
    modes of their distributions: what is kept of the clip, of which here is nothing, so that it is grey, then the whole
    clip, which is to be made anew. Of a reference all is kept, and zeros follow.

    Args:
        references: the inputs that are the references.
    """

    def __init__(self, folder: Path, file: Path | None, dtype: torch.dtype, *, references: tuple[str, ...] = ()):
        super().__init__(folder, file, dtype, draw="mode")
        self.name, self.reads, self.outputs = "vae_guide", (GUIDE, *references), ["guide_latents"]
        self.leading = len(references)

    def encode(self, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        """Latents (B, 2 C, T, h, w) of clips BCFHW and pictures BC1HW in [-1, 1]."""
        guide_BCFHW, *references = (inputs[name] for name in self.reads)
        anew_BCfhw = self._latents(guide_BCFHW)
        kept_BCfhw = self._latents(torch.zeros_like(guide_BCFHW[:1])).expand_as(anew_BCfhw)
        frames = [torch.cat([kept_BCfhw, anew_BCfhw], dim=1)]
        for picture_BC1HW in references:
            latent_BC1hw = self._latents(picture_BC1HW)
            frames.insert(0, torch.cat([latent_BC1hw, torch.zeros_like(latent_BC1hw)], dim=1))
        return {self.outputs[0]: torch.cat(frames, dim=2)}

    def _latents(self, pixels_BCFHW: torch.Tensor) -> torch.Tensor:
        return super().encode(pixels=pixels_BCFHW)[self.outputs[0]]

    def feature_shapes(self, bucket: Bucket) -> Shapes:
        shapes = super().feature_shapes(bucket).items()
        return {name: (_longer((2 * shape[0], *shape[1:]), self.leading), kind) for name, (shape, kind) in shapes}


def _longer(shape: tuple[int, ...], frames: int) -> tuple[int, ...]:
    """The shape (C, f, h, w) with further frames."""
    channels, own, *size = shape
    return channels, own + frames, *size
