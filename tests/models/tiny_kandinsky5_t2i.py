"""A whole tiny Kandinsky 5 of text to image in diffusers' layout; the VAE is the miniature Flux's, with a shift that is
not used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, Kandinsky5Transformer3DModel
from diffusers import Kandinsky5T2IPipeline as StockPipeline
from einops import rearrange

from models.kandinsky5 import Kandinsky5Pipeline
from tests.models import tiny_kandinsky5
from tests.models.tiny_flux import MINI_FLUX
from tests.models.tiny_folder import drawn
from utils.settings.run_tables import SamplingSettings

STOCK = StockPipeline
SAMPLING = {"width": 96, "height": 64, "guidance": 3.0, "negative_prompt": "blurred"}
CHANNELS = json.loads((MINI_FLUX / "vae" / "config.json").read_text())["latent_channels"]
pipeline, features, prompt_features = (
    tiny_kandinsky5.pipeline,
    tiny_kandinsky5.features,
    tiny_kandinsky5.prompt_features,
)


def write_folder(folder: Path, stock: type = STOCK, **changes: Any) -> Path:
    """`changes` are the transformer's."""
    (folder / "vae").mkdir()
    for file in (MINI_FLUX / "vae").iterdir():
        (folder / "vae" / file.name).symlink_to(file)
    config = folder / "vae" / "config.json"
    shifted = {**json.loads(config.read_text()), "shift_factor": 0.5}
    config.unlink()
    config.write_text(json.dumps(shifted))
    sizes = {"in_visual_dim": CHANNELS, "out_visual_dim": CHANNELS, "visual_cond": False}
    return tiny_kandinsky5.write_parts(folder, stock, AutoencoderKL, 3.0, **{**sizes, **changes})


def whole(
    denoiser: Kandinsky5Transformer3DModel,
    pipeline: Kandinsky5Pipeline,
    features: dict,
    x_t: torch.Tensor,
    t_B: torch.Tensor,
) -> torch.Tensor:
    return tiny_kandinsky5.whole(denoiser, pipeline, features, x_t.unsqueeze(2), t_B, (1, 1, 1)).squeeze(2)


def stock_latents(stock: StockPipeline, pixels_BCFHW: torch.Tensor) -> torch.Tensor:
    return stock.vae.encode(pixels_BCFHW[:, :, 0]).latent_dist.mode() * stock.vae.config.scaling_factor


def draw(stock: StockPipeline, sampling: SamplingSettings, noise: torch.Tensor) -> torch.Tensor:
    # It would take the nearest of the sizes that it was trained on.
    stock.resolutions = [(sampling.width, sampling.height)]
    channels, height, width = noise.shape[1:]
    keys = {"max_sequence_length": tiny_kandinsky5.TEXT_TOKENS}
    made = drawn(stock, sampling, noise.reshape(1, 1, height, width, channels), **keys).image
    return rearrange(made, "b 1 h w c -> b c h w")
