"""The tiny OmniGen2 with references."""

from __future__ import annotations

import torch

from models.foundation.encoders.vae import picture_noise
from tests.models import tiny_omnigen2
from tests.models.tiny_wan_i2v import PICTURE
from utils.diffusion.seeds import normal
from utils.media.decode import load_image
from utils.media.geometry import View
from utils.settings.run_tables import SamplingSettings

STOCK, write_folder, pipeline = tiny_omnigen2.STOCK, tiny_omnigen2.write_folder, tiny_omnigen2.pipeline
features, whole = tiny_omnigen2.features, tiny_omnigen2.whole
SIZES = [(32, 48, 1), (64, 32, 1)]
SAMPLING = {**tiny_omnigen2.SAMPLING, "control_images": [[str(PICTURE), str(PICTURE)]]}
IMAGE_GUIDANCE = 2.0
"""As by default."""


def features_of_pictures(latent_shape: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Two references for each picture of a batch, in sizes of their own."""
    channels, height, width = latent_shape
    sizes = {"control_latents": (height, width), "control_2_latents": (height + 2, width - 2)}
    return {name: normal((2, channels, *size), 0, name) for name, size in sizes.items()}


def draw(stock: tiny_omnigen2.StockPipeline, sampling: SamplingSettings, noise: torch.Tensor) -> torch.Tensor:
    pixels_BCFHW = load_image(PICTURE, View(sampling.width, sampling.height, "center"))[None]
    with torch.no_grad():
        posterior = stock.vae.encode(pixels_BCFHW[:, :, 0]).latent_dist
    # The draw that is always the same for a picture.
    drawn = posterior.mode() + posterior.std * picture_noise(pixels_BCFHW, posterior.mean)
    config = stock.vae.config
    latents = (drawn - (config.shift_factor or 0.0)) * config.scaling_factor
    return stock.draw(sampling, noise, [latents[0], latents[0]], IMAGE_GUIDANCE)
