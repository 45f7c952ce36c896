"""What VACE is given, and in part makes: a clip to follow, masks of what of it is kept, and reference pictures that
lead it; encoded by the clip's VAE.

Of several references the last is the first in time, as in inference.

Shapes: B batch, C channels, F frames, H W pixels, R references, f h w latent cells; T = R + f; M pixels of a cell, N
bytes with a bit for each.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch.nn import functional

from models.foundation.encoders.video_vae import WanAutoencoder
from utils.dataset.inputs import GUIDE, REGIONS
from utils.dataset.samples import Bucket

MADE_ANEW = "made_anew"
"""The feature with the masks of regions."""
BITS, RGB = 8, 3

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
        clip, *references = (inputs[name] for name in self.reads)
        frames = [torch.cat(self._of_clip(clip), dim=1)]
        for picture_BC1HW in references:
            latent_BC1hw = self._latents(picture_BC1HW)
            frames.insert(0, torch.cat([latent_BC1hw, torch.zeros_like(latent_BC1hw)], dim=1))
        return {self.outputs[0]: torch.cat(frames, dim=2)}

    def _of_clip(self, guide_BCFHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents (B, C, f, h, w) of what is kept, and of what is made anew."""
        anew_BCfhw = self._latents(guide_BCFHW)
        return self._latents(torch.zeros_like(guide_BCFHW[:1])).expand_as(anew_BCfhw), anew_BCfhw

    def _latents(self, pixels_BCFHW: torch.Tensor) -> torch.Tensor:
        return super().encode(pixels=pixels_BCFHW)[self.outputs[0]]

    def feature_shapes(self, bucket: Bucket) -> Shapes:
        shapes = super().feature_shapes(bucket).items()
        return {name: (_longer((2 * shape[0], *shape[1:]), self.leading), kind) for name, (shape, kind) in shapes}


class RegionsAutoencoder(GuideAutoencoder):
    """The same of clips of which regions are kept, as masks say. Yields the masks too, as `made_anew`.

    In the stock pipeline grey levels of a mask reach the model's channels, and only the pixels are told apart at one
    half; here both are.
    """

    def __init__(self, *others: Any, references: tuple[str, ...] = ()):
        super().__init__(*others, references=references)
        self.name, self.reads = "vae_regions", (REGIONS, *references)

    def encode(self, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        """Latents (B, 2 C, T, h, w) of clips (B, 4, F, H, W) in [-1, 1], whose last channel is 1 where they are made
        anew and 0 where they are kept, and of pictures BC1HW; and the bits (B, N, f, h, w) of that channel."""
        region_B1FHW = inputs[REGIONS][:, RGB:]
        size = self.feature_shapes(Bucket(*reversed(region_B1FHW.shape[2:])))[MADE_ANEW][0]
        cells_BMfhw = pixels_of_cells(region_B1FHW, size[1:])
        return {**super().encode(**inputs), MADE_ANEW: packed(cells_BMfhw)}

    def _of_clip(self, regions_B4FHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        guide_BCFHW, region_B1FHW = regions_B4FHW.split([RGB, 1], dim=1)
        return self._latents(guide_BCFHW * (1 - region_B1FHW)), self._latents(guide_BCFHW * region_B1FHW)

    def feature_shapes(self, bucket: Bucket) -> Shapes:
        shapes = super().feature_shapes(bucket)
        (_, frames, height, width), _ = shapes[self.outputs[0]]
        bits = (bucket.height // height) * (bucket.width // width)
        return {**shapes, MADE_ANEW: ((bits // BITS, frames - self.leading, height, width), torch.uint8)}


def pixels_of_cells(mask_B1FHW: torch.Tensor, size: tuple[int, ...]) -> torch.Tensor:
    """A mask as VACE reads it, (B, M, f, h, w): the pixels of each latent cell are its channels, row by row, and of the
    frames that a latent frame stands for it has the one in the middle of an equal share of all (`prepare_masks` of
    diffusers' pipeline). So a first frame that is kept alone is not among them, in inference either."""
    frames, height, width = size
    numbers_11F = torch.arange(mask_B1FHW.shape[2], dtype=torch.float32)[None, None]
    middles_f = functional.interpolate(numbers_11F, size=frames, mode="nearest-exact")[0, 0].long()
    cells_BfHW = mask_B1FHW[:, 0, middles_f]
    return rearrange(cells_BfHW, "b f (h p) (w q) -> b (p q) f h w", h=height, w=width)


def packed(mask_BMfhw: torch.Tensor) -> torch.Tensor:
    """Zeros and ones as the bits of bytes (B, N, f, h, w), the first channel in the lowest bit."""
    bits_BNEfhw = rearrange(mask_BMfhw.to(torch.uint8), "b (n e) f h w -> b n e f h w", e=BITS)
    return (bits_BNEfhw << _places()).sum(dim=2, dtype=torch.uint8)


def unpacked(bytes_BNfhw: torch.Tensor) -> torch.Tensor:
    """Zeros and ones (B, M, f, h, w), uint8, of `packed` bytes."""
    return rearrange((bytes_BNfhw[:, :, None] >> _places()) & 1, "b n e f h w -> b (n e) f h w")


def _places() -> torch.Tensor:
    return torch.arange(BITS, dtype=torch.uint8)[:, None, None, None]


def _longer(shape: tuple[int, ...], frames: int) -> tuple[int, ...]:
    """The shape (C, f, h, w) with further frames."""
    channels, own, *size = shape
    return channels, own + frames, *size
