"""Models of still pictures with the latents of Flux.2's VAE, of which a cell is a patch of its own cells."""

from __future__ import annotations

from abc import ABC
from functools import cached_property
from typing import Any, ClassVar

from models.families.pictures import PicturePipeline
from models.foundation.encoders.flux2_vae import FLUX2_VAE, Flux2Autoencoder, latent_shape


class PatchedPicturePipeline(PicturePipeline, ABC):
    """A model in which a token is a cell of the latent.

    Attributes:
        autoencoder_class: the VAE.
    """

    patch = 1
    autoencoder_class: ClassVar[type[Flux2Autoencoder]] = Flux2Autoencoder

    def autoencoder(self) -> Flux2Autoencoder:
        options = self.options
        return self.autoencoder_class(options.diffusers_path, options.vae_path, self.dtype, draw=options.latents)

    @cached_property
    def vae_config(self) -> dict[str, Any]:
        return FLUX2_VAE.config(self.options.diffusers_path, self.options.vae_path)

    def latent_shape(self, width: int, height: int, frames: int = 1) -> tuple[int, ...]:
        return latent_shape(self.vae_config, width, height)

    @property
    def cell(self) -> int:
        return 2 * super().cell
