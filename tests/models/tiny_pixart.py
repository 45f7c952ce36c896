"""A whole tiny PixArt-Sigma in diffusers' layout: the miniature Flux's T5, the rest of its own. `tiny_pixart_alpha` is
the other one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, PixArtTransformer2DModel
from diffusers import PixArtSigmaPipeline as StockPipeline
from transformers import PreTrainedTokenizerFast, T5EncoderModel

from models.pixart import PixArtOptions, PixArtPipeline
from tests.models.tiny_flux import MINI_FLUX
from tests.models.tiny_folder import drawn, of_true_length, ragged, randomised, write_index
from tests.models.tiny_sd15 import write_vae
from utils.settings.schema import SamplingSettings

STOCK = StockPipeline
SAMPLING = {"width": 96, "height": 64, "guidance": 3.0, "negative_prompt": "blurred"}
TEXT_TOKENS, TEXT_WIDTH = 64, 64
TRANSFORMER = {
    "sample_size": 8,
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 4,
    "attention_head_dim": 12,
    "num_attention_heads": 2,
    "cross_attention_dim": 24,
    "caption_channels": TEXT_WIDTH,
    "interpolation_scale": 2,
}
CUT = {"partition_method": "uniform"}
"""What embeds the time takes more parameters than a tiny block."""


def write_folder(folder: Path, stock: type = STOCK, **changes: Any) -> Path:
    """`changes` are the transformer's."""
    torch.manual_seed(0)
    (folder / "text_encoder").symlink_to(MINI_FLUX / "text_encoder_2")
    (folder / "tokenizer").symlink_to(MINI_FLUX / "tokenizer_2")
    write_vae(folder)
    randomised(PixArtTransformer2DModel(**{**TRANSFORMER, **changes}), 1).save_pretrained(folder / "transformer")
    DPMSolverMultistepScheduler(beta_schedule="linear").save_pretrained(folder / "scheduler")
    parts = {
        "scheduler": DPMSolverMultistepScheduler,
        "text_encoder": T5EncoderModel,
        "tokenizer": PreTrainedTokenizerFast,
        "transformer": PixArtTransformer2DModel,
        "vae": AutoencoderKL,
    }
    write_index(folder, stock, parts)
    return folder


def pipeline(folder: Path, **options: Any) -> PixArtPipeline:
    options = {"dtype": "float32", "max_sequence_length": TEXT_TOKENS, **options}
    return PixArtPipeline(PixArtOptions(type="pixart", diffusers_path=folder, **options), seed=0)


def features(lengths: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Random text features of these many tokens each."""
    return ragged("t5", lengths, TEXT_WIDTH)


def whole(
    denoiser: PixArtTransformer2DModel, pipeline: PixArtPipeline, features: dict, x_t: torch.Tensor, t_B: torch.Tensor
) -> torch.Tensor:
    mask_BL, (height, width) = features["t5_mask"], x_t.shape[2:]
    sizes = {
        "resolution": torch.tensor([[8.0 * height, 8.0 * width]] * len(x_t)),
        "aspect_ratio": torch.tensor([[height / width]] * len(x_t)),
    }
    return denoiser(
        x_t,
        encoder_hidden_states=features["t5"],
        timestep=(t_B * 1000).long(),
        added_cond_kwargs=sizes,
        encoder_attention_mask=None if mask_BL.all() else mask_BL.long(),
        return_dict=False,
    )[0]


def prompt_features(stock: StockPipeline, captions: list[str]) -> list[dict[str, torch.Tensor]]:
    how = {"clean_caption": False, "max_sequence_length": TEXT_TOKENS}
    texts, masks, *_ = stock.encode_prompt(captions, do_classifier_free_guidance=False, **how)
    return of_true_length("t5", texts, masks.sum(dim=1).tolist())


def stock_latents(stock: Any, pixels_BCFHW: torch.Tensor) -> torch.Tensor:
    return stock.vae.encode(pixels_BCFHW[:, :, 0]).latent_dist.mode() * stock.vae.config.scaling_factor


def draw(stock: StockPipeline, sampling: SamplingSettings, noise: torch.Tensor) -> torch.Tensor:
    how = {"clean_caption": False, "use_resolution_binning": False, "max_sequence_length": TEXT_TOKENS}
    return drawn(stock, sampling, noise, **how).images
