"""A whole tiny Stable Diffusion 1.5 in diffusers' layout: the miniature Flux's words, the rest of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, PNDMScheduler, UNet2DConditionModel
from diffusers import StableDiffusionPipeline as StockPipeline
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from models.foundation.layers.ensemble import Ensemble
from models.sd15 import Sd15Options, Sd15Pipeline
from tests.models.tiny_flux import MINI_FLUX
from tests.models.tiny_folder import drawn, randomised, write_index
from utils.diffusion.seeds import normal
from utils.settings.run_tables import SamplingSettings

STOCK = StockPipeline
SAMPLING = {"width": 128, "height": 64, "guidance": 4.0, "negative_prompt": "blurred"}
WIDTH = 16
UNET = {
    "sample_size": 16,
    "layers_per_block": 1,
    "block_out_channels": (8, 16),
    "norm_num_groups": 4,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": WIDTH,
    "attention_head_dim": 4,
}
VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (8, 8, 8, 16),
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 4,
    # Such that latents of random weights are about as large as they should be.
    "scaling_factor": 3.0,
}
NOISE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}


def clip_config(width: int, **changes: Any) -> CLIPTextConfig:
    config = {
        "vocab_size": 1217,
        "bos_token_id": 1215,
        "eos_token_id": 1216,
        "pad_token_id": 1216,
        "hidden_size": width,
        "projection_dim": width,
        "intermediate_size": 32,
        "num_attention_heads": 2,
        "num_hidden_layers": 3,
    }
    return CLIPTextConfig(**{**config, **changes})


def write_vae(folder: Path) -> None:
    randomised(AutoencoderKL(**VAE), 4).save_pretrained(folder / "vae")


def write_folder(folder: Path, **changes: Any) -> Path:
    """`changes` are the UNet's."""
    torch.manual_seed(0)
    (folder / "tokenizer").symlink_to(MINI_FLUX / "tokenizer")
    write_vae(folder)
    randomised(CLIPTextModel(clip_config(WIDTH)), 2).save_pretrained(folder / "text_encoder")
    randomised(UNet2DConditionModel(**{**UNET, **changes}), 1).save_pretrained(folder / "unet")
    PNDMScheduler(**NOISE, skip_prk_steps=True).save_pretrained(folder / "scheduler")
    parts = {
        "scheduler": PNDMScheduler,
        "text_encoder": CLIPTextModel,
        "tokenizer": CLIPTokenizer,
        "unet": UNet2DConditionModel,
        "vae": AutoencoderKL,
        "feature_extractor": None,
        "image_encoder": None,
        "safety_checker": None,
    }
    write_index(folder, STOCK, parts, requires_safety_checker=False)
    return folder


def pipeline(folder: Path, **options: Any) -> Sd15Pipeline:
    return Sd15Pipeline(Sd15Options(type="sd15", diffusers_path=folder, **{"dtype": "float32", **options}), seed=0)


def features(lengths: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Random text features; they have all the same number of tokens."""
    return {"clip_l": normal((len(lengths), 77, WIDTH), 0, "clip_l", *lengths)}


def whole(
    denoiser: Ensemble | UNet2DConditionModel,
    pipeline: Sd15Pipeline,
    features: dict,
    x_t: torch.Tensor,
    t_B: torch.Tensor,
) -> torch.Tensor:
    unet = getattr(denoiser, "unet", denoiser)
    return unet(x_t, (t_B * 1000).long(), encoder_hidden_states=features["clip_l"], return_dict=False)[0]


def prompt_features(stock: StockPipeline, captions: list[str]) -> list[dict[str, torch.Tensor]]:
    text_BLD, _ = stock.encode_prompt(captions, "cpu", 1, False)
    return [{"clip_l": text_LD} for text_LD in text_BLD]


def stock_latents(stock: Any, pixels_BCFHW: torch.Tensor) -> torch.Tensor:
    return stock.vae.encode(pixels_BCFHW[:, :, 0]).latent_dist.mode() * stock.vae.config.scaling_factor


def draw(stock: Any, sampling: SamplingSettings, noise: torch.Tensor) -> torch.Tensor:
    return drawn(stock, sampling, noise).images
