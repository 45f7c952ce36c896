"""A whole tiny Mochi in diffusers' layout, with random weights; text encoder and tokenizer are the miniature Flux's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLMochi, FlowMatchEulerDiscreteScheduler, MochiTransformer3DModel
from diffusers import MochiPipeline as StockPipeline
from transformers import PreTrainedTokenizerFast, T5EncoderModel

from models.mochi import MochiOptions, MochiPipeline
from tests.models.tiny_flux import MINI_FLUX
from tests.models.tiny_folder import drawn, of_true_length, ragged, randomised, write_index
from utils.diffusion.seeds import normal
from utils.settings.run_tables import SamplingSettings

STOCK = StockPipeline
SIZES = [(48, 32, 1), (32, 64, 7)]
"""A still and a clip."""
SAMPLING = {"width": 64, "height": 32, "frames": 7, "guidance": 3.0, "negative_prompt": "blurred"}
# Each block computes the angles of its tokens, so that the gradients of their frequencies are sums of what comes from
# each, where the stock module sums what comes to the angles.
SUMMED_OTHERWISE = ("pos_frequencies",)
TEXT_TOKENS, TEXT_WIDTH, CHANNELS = 24, 64, 4
TRANSFORMER = {
    "in_channels": CHANNELS,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_layers": 3,
    "pooled_projection_dim": 24,
    "text_embed_dim": TEXT_WIDTH,
    "time_embed_dim": 16,
}
VAE = {
    "latent_channels": CHANNELS,
    "encoder_block_out_channels": (32,) * 4,
    "decoder_block_out_channels": (32,) * 4,
    "layers_per_block": (1,) * 5,
    "latents_mean": (0.1, -0.2, 0.3, 0.0),
    "latents_std": (1.5, 0.7, 1.0, 2.0),
    "scaling_factor": 0.8,
}


def write_folder(folder: Path, index: dict[str, Any] | None = None, **changes: Any) -> Path:
    """`index` and `changes` are those of the index and of the transformer."""
    torch.manual_seed(0)
    for part, source in {"text_encoder": "text_encoder_2", "tokenizer": "tokenizer_2"}.items():
        (folder / part).symlink_to(MINI_FLUX / source)
    transformer = randomised(MochiTransformer3DModel(**{**TRANSFORMER, **changes}), 1)
    with torch.no_grad():
        transformer.pos_frequencies.copy_(normal(tuple(transformer.pos_frequencies.shape), 0, "frequencies"))
    transformer.save_pretrained(folder / "transformer")
    randomised(AutoencoderKLMochi(**VAE), 2).save_pretrained(folder / "vae")
    FlowMatchEulerDiscreteScheduler(invert_sigmas=True, shift=1.5).save_pretrained(folder / "scheduler")
    parts = {
        "scheduler": FlowMatchEulerDiscreteScheduler,
        "vae": AutoencoderKLMochi,
        "text_encoder": T5EncoderModel,
        "tokenizer": PreTrainedTokenizerFast,
        "transformer": MochiTransformer3DModel,
    }
    write_index(folder, STOCK, parts, **(index or {}))
    return folder


def pipeline(folder: Path, **options: Any) -> MochiPipeline:
    options = {"dtype": "float32", "max_sequence_length": TEXT_TOKENS, **options}
    return MochiPipeline(MochiOptions(type="mochi", diffusers_path=folder, **options), seed=0)


def features(lengths: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Random text features of these many tokens each."""
    return ragged("t5", lengths, TEXT_WIDTH)


def whole(
    denoiser: MochiTransformer3DModel, pipeline: MochiPipeline, features: dict, x_t: torch.Tensor, t_B: torch.Tensor
) -> torch.Tensor:
    """With the stock processor."""
    from diffusers.models.attention_processor import MochiAttnProcessor2_0

    for block in denoiser.transformer_blocks:
        block.attn1.processor = MochiAttnProcessor2_0()
    time_B = (1 - t_B) * 1000
    (output,) = denoiser(x_t, features["t5"], time_B, features["t5_mask"], return_dict=False)
    return output


def prompt_features(stock: StockPipeline, captions: list[str]) -> list[dict[str, torch.Tensor]]:
    text_BLD, mask_BL, *_ = stock.encode_prompt(
        captions, do_classifier_free_guidance=False, max_sequence_length=TEXT_TOKENS, device="cpu"
    )
    return of_true_length("t5", text_BLD, mask_BL.sum(1).tolist())


def stock_latents(stock: StockPipeline, pixels_BCFHW: torch.Tensor) -> torch.Tensor:
    """The inverse of what the stock pipeline does before it decodes."""
    mean, std = (torch.tensor(VAE[name]).view(1, -1, 1, 1, 1) for name in ("latents_mean", "latents_std"))
    return (stock.vae.encode(pixels_BCFHW).latent_dist.mode() - mean) * VAE["scaling_factor"] / std


def draw(stock: StockPipeline, sampling: SamplingSettings, noise: torch.Tensor) -> torch.Tensor:
    return drawn(stock, sampling, noise, num_frames=sampling.frames, max_sequence_length=TEXT_TOKENS).frames
