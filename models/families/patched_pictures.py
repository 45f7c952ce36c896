"""Models of still pictures with the latents of Flux.2's VAE, of which a cell is a patch of its own cells; and what
those of Black Forest Labs among them share.

Shapes: L text tokens.
"""

from __future__ import annotations

from abc import ABC
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch.nn import functional

from models.families.pictures import PicturePipeline
from models.foundation.encoders.flux2_vae import FLUX2_VAE, Flux2Autoencoder, latent_shape

REFERENCES = tuple(f"control_{number}" if number > 1 else "control" for number in range(1, 5))
"""What control images are called, of which each is a reference."""


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


def text_positions(length: int) -> torch.Tensor:
    """(0, 0, 0, number) of every text token (L, 4)."""
    return functional.pad(torch.arange(length).float().unsqueeze(1), (3, 0))
