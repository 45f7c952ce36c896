"""Models of still pictures with the latents of `AutoencoderKL`."""

from __future__ import annotations

from abc import ABC
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from models.base import BasePipeline
from models.foundation.checkpoints.configs import stock_scheduler
from models.foundation.encoders.vae import ImageAutoencoder, vae_config
from utils.dataset.buckets import MediaFacts

if TYPE_CHECKING:
    from diffusers import FlowMatchEulerDiscreteScheduler


class PicturePipeline(BasePipeline, ABC):
    """A model of still pictures that samples with the Euler steps of flow matching.

    Attributes:
        patch: the side of an image token in latent cells.
    """

    media = MediaFacts(spatial=16, temporal=1, max_frames=1)
    patch: ClassVar[int] = 2

    def autoencoder(self) -> ImageAutoencoder:
        """The VAE."""
        options = self.options
        return ImageAutoencoder(options.diffusers_path, options.vae_path, self.dtype, draw=options.latents)

    def tokens(self, latent_shape: Sequence[int]) -> int:
        _, height, width = latent_shape
        return (height // self.patch) * (width // self.patch)

    def latent_shape(self, width: int, height: int, frames: int = 1) -> tuple[int, ...]:
        return self.vae_config["latent_channels"], height // self.cell, width // self.cell

    @property
    def cell(self) -> int:
        """The side of a latent cell in pixels."""
        return 2 ** (len(self.vae_config["block_out_channels"]) - 1)

    def scheduler(self) -> FlowMatchEulerDiscreteScheduler:
        return stock_scheduler(self.options.diffusers_path, "FlowMatchEulerDiscreteScheduler")

    # Kept, as every micro-batch asks for it.
    @cached_property
    def vae_config(self) -> dict[str, Any]:
        """The configuration of the VAE.

        Raises:
            UserError: it is missing, damaged, or belongs to another model.
        """
        return vae_config(self.options.diffusers_path, self.options.vae_path)
