"""A whole tiny ERNIE-Image in diffusers' layout, with random weights; the VAE is tiny Flux.2's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLFlux2, ErnieImageTransformer2DModel, FlowMatchEulerDiscreteScheduler
from diffusers import ErnieImagePipeline as StockPipeline
from transformers import Mistral3Config, Mistral3Model, Qwen2Tokenizer

from models.ernie_image import ErnieImageOptions, ErnieImagePipeline
from tests.models import tiny_flux2, tiny_flux2_dev, tiny_z_image
from tests.models.tiny_folder import drawn, ragged, randomised, write_index
from utils.settings.run_tables import SamplingSettings

STOCK = StockPipeline
SAMPLING = {"width": 96, "height": 64, "guidance": 3.0, "negative_prompt": "blurred"}
TEXT_TOKENS, TEXT_WIDTH, CHANNELS = 64, 16, tiny_flux2.CHANNELS
SUMMED_OTHERWISE = ("adaLN_modulation.", "time_embedding.")
"""The stock module repeats the modulation for every token, and sums its gradients over blocks first, then over
tokens."""
TRANSFORMER = {
    "hidden_size": 32,
    "num_attention_heads": 2,
    "num_layers": 3,
    "ffn_hidden_size": 48,
    "in_channels": 4 * CHANNELS,
    "out_channels": 4 * CHANNELS,
    "text_in_dim": TEXT_WIDTH,
    "rope_axes_dim": (8, 4, 4),
}
TEXT = {**tiny_flux2_dev.TEXT, "num_hidden_layers": 3}


def write_folder(folder: Path, **changes: Any) -> Path:
    """`changes` are the transformer's."""
    words = tiny_z_image.tokenizer()
    words.model_max_length = TEXT_TOKENS
    words.save_pretrained(folder / "tokenizer")
    tiny_flux2.vae().save_pretrained(folder / "vae")
    torch.manual_seed(0)
    randomised(ErnieImageTransformer2DModel(**{**TRANSFORMER, **changes}), 1).save_pretrained(folder / "transformer")
    config = Mistral3Config(text_config=TEXT, vision_config=tiny_flux2_dev.VISION, image_token_index=299)
    randomised(Mistral3Model(config), 3).save_pretrained(folder / "text_encoder")
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(folder / "scheduler")
    parts = {
        "scheduler": FlowMatchEulerDiscreteScheduler,
        "text_encoder": Mistral3Model,
        "tokenizer": Qwen2Tokenizer,
        "transformer": ErnieImageTransformer2DModel,
        "vae": AutoencoderKLFlux2,
        "pe": None,
        "pe_tokenizer": None,
    }
    write_index(folder, STOCK, parts)
    return folder


def pipeline(folder: Path, **options: Any) -> ErnieImagePipeline:
    options = {"dtype": "float32", "max_sequence_length": TEXT_TOKENS, **options}
    return ErnieImagePipeline(ErnieImageOptions(type="ernie_image", diffusers_path=folder, **options), seed=0)


def features(lengths: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Random text features of these many tokens each."""
    return ragged("mistral3", lengths, TEXT_WIDTH)


def whole(
    denoiser: ErnieImageTransformer2DModel,
    pipeline: ErnieImagePipeline,
    features: dict,
    x_t: torch.Tensor,
    t_B: torch.Tensor,
) -> torch.Tensor:
    return denoiser(x_t, t_B * 1000, features["mistral3"], features["mistral3_mask"].sum(1), return_dict=False)[0]


def prompt_features(stock: StockPipeline, captions: list[str]) -> list[dict[str, torch.Tensor]]:
    texts = stock.encode_prompt(captions, "cpu")
    return [{"mistral3": text_LD, "mistral3_mask": torch.ones(len(text_LD), dtype=torch.bool)} for text_LD in texts]


def stock_latents(stock: StockPipeline, pixels_BCFHW: torch.Tensor) -> torch.Tensor:
    """The inverse of what its pipeline does before it decodes."""
    patches = stock._patchify_latents(stock.vae.encode(pixels_BCFHW[:, :, 0]).latent_dist.mode())
    mean, variance = (one.view(1, -1, 1, 1) for one in (stock.vae.bn.running_mean, stock.vae.bn.running_var))
    return (patches - mean) / torch.sqrt(variance + 1e-5)


def draw(stock: StockPipeline, sampling: SamplingSettings, noise: torch.Tensor) -> torch.Tensor:
    return drawn(stock, sampling, noise).images
