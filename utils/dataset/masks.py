"""Masks at the size of the latent, which weigh the loss.

Shapes: B batch, F frames, H height, W width, f h w the same of the latent.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional

from utils.dataset.samples import Bucket

MASK = "loss_mask"


class MaskEncoder:
    """Masks as an `Encoder`: each latent cell gets the mean of the pixels that it covers.

    Args:
        latent_shape: (width, height, frames) -> the shape of a latent, (C, h, w) or (C, f, h, w).
    """

    name = "mask"
    reads = ("mask",)
    fingerprint = "mean 1"

    def __init__(self, latent_shape: Callable[[int, int, int], tuple[int, ...]]) -> None:
        self._latent_shape = latent_shape

    def load(self, device: torch.device) -> None:
        """Nothing to load."""

    def unload(self) -> None:
        """Nothing to free."""

    def encode(self, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        """Means (B, 1, h, w) or (B, 1, f, h, w) of `mask_B1FHW` in [0, 1].

        The first latent frame covers the first frame only, each of the others covers several.
        """
        frames, height, width = mask.shape[2:]
        _, *sizes = self._latent_shape(width, height, frames)
        first = functional.adaptive_avg_pool3d(mask[:, :, :1], (1, *sizes[-2:]))
        if len(sizes) == 2:
            return {MASK: first[:, :, 0]}
        rest = [functional.adaptive_avg_pool3d(mask[:, :, 1:], (sizes[0] - 1, *sizes[1:]))] if sizes[0] > 1 else []
        return {MASK: torch.cat([first, *rest], dim=2)}

    def feature_shapes(self, bucket: Bucket) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        shape = self._latent_shape(bucket.width, bucket.height, bucket.frames)
        return {MASK: ((1, *shape[1:]), torch.float32)}
