"""A whole tiny AuraFlow in diffusers' layout, with random weights; the tokenizer is the miniature Flux's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AuraFlowPipeline as StockPipeline
from diffusers import AuraFlowTransformer2DModel, AutoencoderKL, FlowMatchEulerDiscreteScheduler
from torch.nn import functional
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from models.auraflow import AuraFlowOptions, AuraFlowPipeline
from tests.models.tiny_flux import MINI_FLUX
from tests.models.tiny_folder import drawn, of_true_length, randomised, write_index
from tests.models.tiny_sd15 import write_vae
from utils.dataset.batches import pad_ragged
from utils.diffusion.seeds import normal
from utils.settings.run_tables import SamplingSettings

STOCK = StockPipeline
SAMPLING = {"width": 96, "height": 64, "guidance": 3.0, "negative_prompt": "blurred"}
TEXT_TOKENS, TEXT_WIDTH, CHANNELS = 24, 16, 4
TRANSFORMER = {
    "sample_size": 16,
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "num_mmdit_layers": 2,
    "num_single_dit_layers": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 4,
    "caption_projection_dim": 32,
    "joint_attention_dim": TEXT_WIDTH,
    "pos_embed_max_size": 81,
}
TEXT = {"vocab_size": 400, "d_model": TEXT_WIDTH, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}


def write_folder(folder: Path, **changes: Any) -> Path:
    """`changes` are the transformer's."""
    torch.manual_seed(0)
    write_vae(folder)
    (folder / "tokenizer").symlink_to(MINI_FLUX / "tokenizer_2")
    randomised(AuraFlowTransformer2DModel(**{**TRANSFORMER, **changes}), 1).save_pretrained(folder / "transformer")
    randomised(UMT5EncoderModel(UMT5Config(**TEXT)), 2).save_pretrained(folder / "text_encoder")
    FlowMatchEulerDiscreteScheduler(shift=1.73).save_pretrained(folder / "scheduler")
    parts = {
        "tokenizer": PreTrainedTokenizerFast,
        "text_encoder": UMT5EncoderModel,
        "vae": AutoencoderKL,
        "transformer": AuraFlowTransformer2DModel,
        "scheduler": FlowMatchEulerDiscreteScheduler,
    }
    write_index(folder, STOCK, parts)
    return folder


def pipeline(folder: Path, **options: Any) -> AuraFlowPipeline:
    options = {"dtype": "float32", "max_sequence_length": TEXT_TOKENS, **options}
    return AuraFlowPipeline(AuraFlowOptions(type="auraflow", diffusers_path=folder, **options), seed=0)


def features(lengths: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Random text features of these many tokens each."""
    return {"umt5": pad_ragged([normal((length, TEXT_WIDTH), 0, "text", length) for length in lengths])}


def whole(
    denoiser: AuraFlowTransformer2DModel,
    pipeline: AuraFlowPipeline,
    features: dict,
    x_t: torch.Tensor,
    t_B: torch.Tensor,
) -> torch.Tensor:
    text_BLD = functional.pad(features["umt5"], (0, 0, 0, TEXT_TOKENS - features["umt5"].shape[1]))
    return denoiser(x_t, encoder_hidden_states=text_BLD, timestep=t_B, return_dict=False)[0]


def prompt_features(stock: StockPipeline, captions: list[str]) -> list[dict[str, torch.Tensor]]:
    text_BLD, *_ = stock.encode_prompt(captions, None, False, max_sequence_length=TEXT_TOKENS, device="cpu")
    lengths = [min(len(stock.tokenizer(caption).input_ids), TEXT_TOKENS) for caption in captions]
    return of_true_length("umt5", text_BLD, lengths)


def stock_latents(stock: StockPipeline, pixels_BCFHW: torch.Tensor) -> torch.Tensor:
    return stock.vae.encode(pixels_BCFHW[:, :, 0]).latent_dist.mode() * stock.vae.config.scaling_factor


def draw(stock: StockPipeline, sampling: SamplingSettings, noise: torch.Tensor) -> torch.Tensor:
    return drawn(stock, sampling, noise, max_sequence_length=TEXT_TOKENS).images
