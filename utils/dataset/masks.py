"""Masks at the size of the latent, which weigh the loss.

Shapes: B batch, F frames, H height, W width, f h w the same of the latent.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
from torch.nn import functional

from utils.dataset.samples import Bucket

MASK = "loss_mask"


class MaskEncoder:
    """Masks as an `Encoder`: each latent cell gets the mean of the pixels that it covers.

    Args:
        latent_shape: (width, height, frames) -> the shape of a latent, (C, h, w) or (C, f, h, w).
        frame_groups: frames -> how many of them each latent frame covers, 0 for one that covers the frame with which
            the next one begins; None if the first one covers the first frame alone, and each of the others as many as
            the next.
    """

    name = "mask"
    reads = ("mask",)

    def __init__(
        self,
        latent_shape: Callable[[int, int, int], tuple[int, ...]],
        frame_groups: Callable[[int], Sequence[int]] | None = None,
    ) -> None:
        self._latent_shape, self._frame_groups = latent_shape, frame_groups
        self.fingerprint = "mean of groups 1" if frame_groups else "mean 1"

    def load(self, device: torch.device) -> None:
        """Nothing to load."""

    def unload(self) -> None:
        """Nothing to free."""

    def encode(self, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        """Means (B, 1, h, w) or (B, 1, f, h, w) of `mask_B1FHW` in [0, 1]."""
        frames, height, width = mask.shape[2:]
        _, *sizes = self._latent_shape(width, height, frames)
        if self._frame_groups:
            counts = self._frame_groups(frames)
            starts = accumulate(counts, initial=0)
            groups = [mask[:, :, start : start + max(count, 1)] for start, count in zip(starts, counts, strict=False)]
            return {MASK: torch.cat([functional.adaptive_avg_pool3d(one, (1, *sizes[-2:])) for one in groups], dim=2)}
        first = functional.adaptive_avg_pool3d(mask[:, :, :1], (1, *sizes[-2:]))
        if len(sizes) == 2:
            return {MASK: first[:, :, 0]}
        rest = [functional.adaptive_avg_pool3d(mask[:, :, 1:], (sizes[0] - 1, *sizes[1:]))] if sizes[0] > 1 else []
        return {MASK: torch.cat([first, *rest], dim=2)}

    def feature_shapes(self, bucket: Bucket) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        shape = self._latent_shape(bucket.width, bucket.height, bucket.frames)
        return {MASK: ((1, *shape[1:]), torch.float32)}
