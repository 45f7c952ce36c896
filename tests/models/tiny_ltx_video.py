"""A whole tiny LTX-Video in diffusers' layout, with random weights; text encoder and tokenizer are the miniature
Flux's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLLTXVideo, FlowMatchEulerDiscreteScheduler, LTXVideoTransformer3DModel
from diffusers import LTXPipeline as StockPipeline
from transformers import PreTrainedTokenizerFast, T5EncoderModel

from models.ltx_video import LTXVideoOptions, LTXVideoPipeline
from tests.models.tiny_flux import MINI_FLUX
from tests.models.tiny_folder import drawn, of_true_length, ragged, randomised, write_index
from utils.settings.run_tables import SamplingSettings

STOCK = StockPipeline
SIZES = [(48, 32, 1), (32, 64, 5)]
"""A still and a clip."""
SAMPLING = {"width": 64, "height": 32, "frames": 5, "guidance": 3.0, "negative_prompt": "blurred"}
TEXT_TOKENS, TEXT_WIDTH, CHANNELS, FPS = 24, 64, 4, 25
CELL, GROUP = 8, 2
TRANSFORMER = {
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "num_attention_heads": 2,
    "attention_head_dim": 14,
    "cross_attention_dim": 28,
    "num_layers": 3,
    "caption_channels": TEXT_WIDTH,
}
VAE = {
    "latent_channels": CHANNELS,
    "block_out_channels": (8, 8),
    "down_block_types": ("LTXVideoDownBlock3D",) * 2,
    "decoder_block_out_channels": (8, 8),
    "layers_per_block": (1, 1, 1),
    "decoder_layers_per_block": (1, 1, 1),
    "spatio_temporal_scaling": (True, False),
    "decoder_spatio_temporal_scaling": (True, False),
    "decoder_inject_noise": (False, False, False),
    "upsample_residual": (False, False),
    "upsample_factor": (1, 1),
    "scaling_factor": 0.8,
}
SHIFT = {"base_image_seq_len": 1024, "max_image_seq_len": 4096, "base_shift": 0.95, "max_shift": 2.05}


def write_folder(folder: Path, vae: dict[str, Any] | None = None, **changes: Any) -> Path:
    """`changes` are the transformer's."""
    torch.manual_seed(0)
    for part, source in {"text_encoder": "text_encoder_2", "tokenizer": "tokenizer_2"}.items():
        (folder / part).symlink_to(MINI_FLUX / source)
    randomised(LTXVideoTransformer3DModel(**{**TRANSFORMER, **changes}), 1).save_pretrained(folder / "transformer")
    autoencoder = randomised(AutoencoderKLLTXVideo(**(vae or VAE)), 2)
    autoencoder.latents_mean.copy_(torch.tensor([0.1, -0.2, 0.3, 0.0]))
    autoencoder.latents_std.copy_(torch.tensor([1.5, 0.7, 1.0, 2.0]))
    autoencoder.save_pretrained(folder / "vae")
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.1, **SHIFT)
    scheduler.save_pretrained(folder / "scheduler")
    parts = {
        "scheduler": FlowMatchEulerDiscreteScheduler,
        "vae": AutoencoderKLLTXVideo,
        "text_encoder": T5EncoderModel,
        "tokenizer": PreTrainedTokenizerFast,
        "transformer": LTXVideoTransformer3DModel,
    }
    write_index(folder, STOCK, parts)
    return folder


def pipeline(folder: Path, **options: Any) -> LTXVideoPipeline:
    options = {"dtype": "float32", "max_sequence_length": TEXT_TOKENS, **options}
    return LTXVideoPipeline(LTXVideoOptions(type="ltx_video", diffusers_path=folder, **options), seed=0)


def features(lengths: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Random text features of these many tokens each."""
    return ragged("t5", lengths, TEXT_WIDTH)


def whole(
    denoiser: LTXVideoTransformer3DModel,
    pipeline: LTXVideoPipeline,
    features: dict,
    x_t: torch.Tensor,
    t_B: torch.Tensor,
) -> torch.Tensor:
    """`t_B` may have a time for each token (B, T)."""
    frames, height, width = x_t.shape[2:]
    (output_BTC,) = denoiser(
        StockPipeline._pack_latents(x_t),
        features["t5"],
        t_B * 1000,
        features["t5_mask"],
        frames,
        height,
        width,
        (GROUP / FPS, CELL, CELL),
        return_dict=False,
    )
    return StockPipeline._unpack_latents(output_BTC, frames, height, width)


def prompt_features(stock: StockPipeline, captions: list[str]) -> list[dict[str, torch.Tensor]]:
    text_BLD, mask_BL, *_ = stock.encode_prompt(
        captions, do_classifier_free_guidance=False, max_sequence_length=TEXT_TOKENS, device="cpu"
    )
    return of_true_length("t5", text_BLD, mask_BL.sum(1).tolist())


def stock_latents(stock: StockPipeline, pixels_BCFHW: torch.Tensor) -> torch.Tensor:
    vae = stock.vae
    latents = vae.encode(pixels_BCFHW).latent_dist.mode()
    return StockPipeline._normalize_latents(latents, vae.latents_mean, vae.latents_std, vae.config.scaling_factor)


def draw(stock: StockPipeline, sampling: SamplingSettings, noise: torch.Tensor) -> torch.Tensor:
    keys = {"num_frames": sampling.frames, "frame_rate": FPS, "max_sequence_length": TEXT_TOKENS}
    latents_BTC = drawn(stock, sampling, StockPipeline._pack_latents(noise), **keys).frames
    return StockPipeline._unpack_latents(latents_BTC, *noise.shape[2:])
