"""The deep compression autoencoder, which makes one latent of a picture instead of a distribution."""

from __future__ import annotations

from typing import Any

import torch

from models.foundation.encoders.vae import Family, ImageAutoencoder, Tensors
from utils.dataset.samples import Bucket


def _from_publisher(tensors: Tensors, config: dict[str, Any]) -> Tensors:
    """Tensors with the publisher's names, under diffusers' names."""
    from diffusers.loaders.single_file_utils import convert_autoencoder_dc_checkpoint_to_diffusers

    return convert_autoencoder_dc_checkpoint_to_diffusers(tensors)


DC = Family(
    "AutoencoderDC",
    ("encoder_block_out_channels", "latent_channels", "scaling_factor"),
    "down_blocks.",
    _from_publisher,
)


def cell_of(config: dict[str, Any]) -> int:
    """The side of a latent cell in pixels."""
    return 2 ** (len(config["encoder_block_out_channels"]) - 1)


class DeepAutoencoder(ImageAutoencoder):
    """Pixels -> latents z * scale; whatever `draw` is, a picture has but one."""

    family = DC

    def feature_shapes(self, bucket: Bucket) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        config = self.family.config(self.folder, self.file)
        cell = cell_of(config)
        shape = (config["latent_channels"], bucket.height // cell, bucket.width // cell)
        return dict.fromkeys(self.outputs, (shape, self.dtype))
