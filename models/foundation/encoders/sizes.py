"""The size of a picture and its crop, which SDXL and others take as a condition (Podell et al. 2023, section 2.2).

Shapes: B batch.
"""

from __future__ import annotations

import torch

from utils.dataset.samples import Bucket

SIZES = "size_ids"


class SizeEncoder:
    """Sizes as an `Encoder`: height and width of the file, top and left of the crop, height and width of what is
    trained."""

    name = "sizes"
    reads = ("size_and_crop",)
    fingerprint = "1"

    def check(self) -> None:
        """It has no files."""

    def load(self, device: torch.device) -> None:
        """Nothing to load."""

    def unload(self) -> None:
        """Nothing to free."""

    def encode(self, size_and_crop: torch.Tensor) -> dict[str, torch.Tensor]:
        """The numbers (B, 6), in pixels."""
        return {SIZES: size_and_crop}

    def feature_shapes(self, bucket: Bucket) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        return {SIZES: ((6,), torch.float32)}
