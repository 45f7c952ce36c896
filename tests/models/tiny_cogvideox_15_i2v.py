"""A whole tiny CogVideoX 1.5 of picture to video in diffusers' layout, with the steps of DPM-Solver++."""

from __future__ import annotations

from functools import partial
from unittest.mock import patch

import torch
from diffusers import CogVideoXDPMScheduler, CogVideoXTransformer3DModel
from diffusers import CogVideoXImageToVideoPipeline as StockPipeline

from models.cogvideox import CogVideoXPipeline
from tests.models import tiny_cogvideox
from tests.models.tiny_flux import MINI_FLUX
from tests.models.tiny_folder import certain_of
from utils.diffusion import seeds
from utils.diffusion.seeds import normal
from utils.media.decode import load_image
from utils.media.geometry import View
from utils.media.writing import tensor_to_image
from utils.settings.run_tables import SamplingSettings

STOCK = StockPipeline
SIZES = [(24, 16, 5), (16, 32, 9)]
PICTURE = MINI_FLUX.parents[1] / "docs" / "quickstart.png"
SAMPLING = {**tiny_cogvideox.SAMPLING, "control_images": [str(PICTURE)]}
TRANSFORMER = {
    "in_channels": 2 * tiny_cogvideox.CHANNELS,
    "patch_size_t": 2,
    "ofs_embed_dim": 12,
    "patch_bias": False,
    "use_rotary_positional_embeddings": True,
    "sample_width": 40,
    "sample_height": 36,
}
write_folder = partial(
    tiny_cogvideox.write_folder,
    stock=STOCK,
    scheduler=CogVideoXDPMScheduler,
    vae={"invert_scale_latents": True},
    **TRANSFORMER,
)
pipeline, features = tiny_cogvideox.pipeline, tiny_cogvideox.features


def features_of_pictures(latent_shape: tuple[int, ...], batch: int = 2) -> dict[str, torch.Tensor]:
    """Random features of the first frames of a batch."""
    channels, _, *size = latent_shape
    names = ("first_frame_latents", "noised_first_frame_latents")
    return {name: normal((batch, channels, 1, *size), 0, name) for name in names}


def whole(
    denoiser: CogVideoXTransformer3DModel,
    pipeline: CogVideoXPipeline,
    features: dict,
    x_t: torch.Tensor,
    t_B: torch.Tensor,
) -> torch.Tensor:
    first = features["first_frame_latents"]
    picture = torch.cat([first, torch.zeros_like(x_t[:, :, 1:])], dim=2)
    return tiny_cogvideox.predicted(denoiser, features, torch.cat([x_t, picture], dim=1), t_B)


def draw(stock: StockPipeline, sampling: SamplingSettings, noise: torch.Tensor) -> torch.Tensor:
    """From this noise, and the mode of what the VAE makes of the picture, of which the stock pipeline draws."""
    picture = tensor_to_image(load_image(PICTURE, View(sampling.width, sampling.height, "center")))
    generator = seeds.generator(sampling.seed, "sample steps", 0)
    with patch.object(stock.vae, "encode", certain_of(stock.vae)):
        return tiny_cogvideox.draw(stock, sampling, noise, image=picture, generator=generator)
