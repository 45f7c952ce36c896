"""A whole tiny Wan in diffusers' layout, with random weights; the tokenizer is the miniature Flux's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanTransformer3DModel
from diffusers import WanPipeline as StockPipeline
from torch.nn import functional
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from models.wan import WanOptions, WanPipeline
from tests.models.tiny_flux import MINI_FLUX
from tests.models.tiny_folder import drawn, of_true_length, randomised, write_index
from utils.dataset.batches import pad_ragged
from utils.diffusion.seeds import normal
from utils.settings.run_tables import SamplingSettings

STOCK = StockPipeline
SIZES = [(48, 32, 1), (32, 64, 9)]
"""A still and a clip."""
SAMPLING = {"width": 48, "height": 32, "frames": 9, "guidance": 5.0, "negative_prompt": "blurred"}
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
TEXT = {"vocab_size": 400, "d_model": TEXT_WIDTH, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}


def write_folder(folder: Path, vae: dict[str, Any] | None = None, **changes: Any) -> Path:
    torch.manual_seed(0)
    (folder / "tokenizer").symlink_to(MINI_FLUX / "tokenizer_2")
    randomised(WanTransformer3DModel(**{**TRANSFORMER, **changes}), 1).save_pretrained(folder / "transformer")
    randomised(AutoencoderKLWan(**(vae or VAE)), 2).save_pretrained(folder / "vae")
    randomised(UMT5EncoderModel(UMT5Config(**TEXT)), 3).save_pretrained(folder / "text_encoder")
    UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0).save_pretrained(
        folder / "scheduler"
    )
    parts = {
        "tokenizer": PreTrainedTokenizerFast,
        "text_encoder": UMT5EncoderModel,
        "transformer": WanTransformer3DModel,
        "transformer_2": None,
        "vae": AutoencoderKLWan,
        "scheduler": UniPCMultistepScheduler,
    }
    write_index(folder, STOCK, parts)
    return folder


def pipeline(folder: Path, **options: Any) -> WanPipeline:
    options = {"dtype": "float32", "max_sequence_length": TEXT_TOKENS, **options}
    return WanPipeline(WanOptions(type="wan", diffusers_path=folder, **options), seed=0)


def features(lengths: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Random text features of these many tokens each."""
    return {"umt5": pad_ragged([normal((length, TEXT_WIDTH), 0, "text", length) for length in lengths])}


def whole(
    denoiser: WanTransformer3DModel, pipeline: WanPipeline, features: dict, x_t: torch.Tensor, t_B: torch.Tensor
) -> torch.Tensor:
    missing = TEXT_TOKENS - features["umt5"].shape[1]
    text_BLD = functional.pad(features["umt5"], (0, 0, 0, missing))
    return denoiser(x_t, t_B * 1000, text_BLD, return_dict=False)[0]


def prompt_features(stock: StockPipeline, captions: list[str]) -> list[dict[str, torch.Tensor]]:
    text_BLD, _ = stock.encode_prompt(captions, None, False, max_sequence_length=TEXT_TOKENS, device="cpu")
    lengths = [min(len(stock.tokenizer(caption).input_ids), TEXT_TOKENS) for caption in captions]
    return of_true_length("umt5", text_BLD, lengths)


def stock_latents(stock: StockPipeline, pixels_BCFHW: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(VAE[name]).view(-1, 1, 1, 1) for name in ("latents_mean", "latents_std"))
    return (stock.vae.encode(pixels_BCFHW).latent_dist.mode() - mean) / std


def draw(stock: StockPipeline, sampling: SamplingSettings, noise: torch.Tensor) -> torch.Tensor:
    keys = {"num_frames": sampling.frames, "max_sequence_length": TEXT_TOKENS}
    return drawn(stock, sampling, noise, **keys).frames
