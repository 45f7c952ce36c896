"""A whole tiny Wan in diffusers' layout, with random weights; the tokenizer is the miniature Flux's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanTransformer3DModel
from torch import nn
from transformers import UMT5Config, UMT5EncoderModel

from models.wan import WanOptions, WanPipeline
from tests.models.tiny_flux import MINI_FLUX
from utils.dataset.batches import pad_ragged
from utils.diffusion.seeds import normal

TEXT_TOKENS, TEXT_WIDTH, CHANNELS = 24, 16, 4
TRANSFORMER = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "text_dim": TEXT_WIDTH,
    "freq_dim": 32,
    "ffn_dim": 32,
    "num_layers": 3,
    "rope_max_seq_len": 32,
}
VAE = {
    "base_dim": 4,
    "z_dim": CHANNELS,
    "dim_mult": [1, 1, 1, 1],
    "num_res_blocks": 1,
    "temperal_downsample": [False, True, True],
    "latents_mean": [0.1, -0.2, 0.3, 0.0],
    "latents_std": [1.5, 0.7, 1.0, 2.0],
}
TEXT = {"vocab_size": 1000, "d_model": TEXT_WIDTH, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}


def randomised(module: nn.Module, seed: int) -> nn.Module:
    """Noise on all parameters: those born as ones or zeros would hide what is behind them."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=draw), alpha=0.05)
    return module


def write_folder(place: Path, **changes: Any) -> Path:
    torch.manual_seed(0)
    (place / "tokenizer").symlink_to(MINI_FLUX / "tokenizer_2")
    randomised(WanTransformer3DModel(**{**TRANSFORMER, **changes}), 1).save_pretrained(place / "transformer")
    randomised(AutoencoderKLWan(**VAE), 2).save_pretrained(place / "vae")
    randomised(UMT5EncoderModel(UMT5Config(**TEXT)), 3).save_pretrained(place / "text_encoder")
    UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0).save_pretrained(
        place / "scheduler"
    )
    return place


def pipeline(folder: Path, **options: Any) -> WanPipeline:
    options = {"dtype": "float32", "max_sequence_length": TEXT_TOKENS, **options}
    return WanPipeline(WanOptions(type="wan", diffusers_path=folder, **options), seed=0)


def features(lengths: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Random text features of these many tokens each."""
    return {"umt5": pad_ragged([normal((length, TEXT_WIDTH), 0, "text", length) for length in lengths])}
