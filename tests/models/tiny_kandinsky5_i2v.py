"""A whole tiny Kandinsky 5 of picture to video in diffusers' layout."""

from __future__ import annotations

from functools import partial
from unittest.mock import patch

import torch
from diffusers import Kandinsky5I2VPipeline as StockPipeline
from diffusers import Kandinsky5Transformer3DModel
from diffusers.pipelines.kandinsky5 import pipeline_kandinsky_i2v as stock_module
from einops import rearrange

from models.kandinsky5 import Kandinsky5Pipeline
from tests.models import tiny_kandinsky5
from tests.models.tiny_flux import MINI_FLUX
from tests.models.tiny_folder import certain_of, drawn
from utils.diffusion.seeds import normal
from utils.media.decode import load_image
from utils.media.geometry import View
from utils.media.writing import tensor_to_image
from utils.settings.run_tables import SamplingSettings

STOCK = StockPipeline
SIZES = [(48, 32, 5), (32, 64, 5)]
PICTURE = MINI_FLUX.parents[1] / "docs" / "quickstart.png"
# Of fewer frames the stock pipeline makes nothing but NaN.
SAMPLING = {**tiny_kandinsky5.SAMPLING, "frames": 17, "control_images": [str(PICTURE)]}
write_folder = partial(tiny_kandinsky5.write_folder, stock=STOCK)
pipeline, features = tiny_kandinsky5.pipeline, tiny_kandinsky5.features


def features_of_pictures(latent_shape: tuple[int, ...], batch: int = 2) -> dict[str, torch.Tensor]:
    """Random features of the first frames of a batch."""
    channels, _, *size = latent_shape
    return {"first_frame_latents": normal((batch, channels, 1, *size), 0, "first frame")}


def whole(
    denoiser: Kandinsky5Transformer3DModel,
    pipeline: Kandinsky5Pipeline,
    features: dict,
    x_t: torch.Tensor,
    t_B: torch.Tensor,
) -> torch.Tensor:
    seen = torch.cat([features["first_frame_latents"], x_t[:, :, 1:]], dim=2)
    x_BfhwC = rearrange(seen, "b c f h w -> b f h w c")
    mask = torch.zeros_like(x_BfhwC[..., :1])
    mask[:, 0] = 1
    x_BfhwC = torch.cat([x_BfhwC, torch.zeros_like(x_BfhwC), mask], dim=-1)
    return tiny_kandinsky5.predicted(denoiser, features, x_BfhwC, t_B, (1, 3.16, 3.16))


def draw(stock: StockPipeline, sampling: SamplingSettings, noise: torch.Tensor) -> torch.Tensor:
    """From this noise, and the mode of what the VAE makes of the picture, of which the stock pipeline draws."""
    picture = tensor_to_image(load_image(PICTURE, View(sampling.width, sampling.height, "center")))
    channels, *grid = noise.shape[1:]
    keys = {"num_frames": sampling.frames, "max_sequence_length": tiny_kandinsky5.TEXT_TOKENS, "image": picture}
    noisy = noise.reshape(1, *grid, channels).clone()
    with (
        patch.object(stock.vae, "encode", certain_of(stock.vae)),
        patch.object(stock_module, "randn_tensor", lambda *sizes, **further: noisy),
    ):
        made = drawn(stock, sampling, None, **keys).frames
    return rearrange(made, "b f h w c -> b c f h w")
