"""A whole tiny CogVideoX 1.0 of text to video in diffusers' layout, with positions that are added; text encoder and
tokenizer are the miniature Flux's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXDPMScheduler, CogVideoXTransformer3DModel
from diffusers import CogVideoXPipeline as StockPipeline
from einops import rearrange
from transformers import PreTrainedTokenizerFast, T5EncoderModel

from models.cogvideox import CogVideoXOptions, CogVideoXPipeline
from tests.models.tiny_flux import MINI_FLUX
from tests.models.tiny_folder import drawn, randomised, write_index
from utils.diffusion.seeds import normal
from utils.settings.run_tables import SamplingSettings

STOCK = StockPipeline
SIZES = [(24, 16, 1), (16, 32, 5)]
"""A still and a clip."""
SAMPLING = {"width": 24, "height": 16, "frames": 5, "guidance": 3.0, "negative_prompt": "blurred"}
TEXT_TOKENS, TEXT_WIDTH, CHANNELS = 24, 64, 4
TRANSFORMER = {
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "time_embed_dim": 12,
    "text_embed_dim": TEXT_WIDTH,
    "num_layers": 3,
    "sample_width": 12,
    "sample_height": 8,
    "sample_frames": 9,
    "temporal_compression_ratio": 2,
    "max_text_seq_length": TEXT_TOKENS,
}
VAE = {
    "latent_channels": CHANNELS,
    "block_out_channels": (4, 8),
    "down_block_types": ("CogVideoXDownBlock3D",) * 2,
    "up_block_types": ("CogVideoXUpBlock3D",) * 2,
    "layers_per_block": 1,
    "norm_num_groups": 2,
    "temporal_compression_ratio": 2,
    "scaling_factor": 0.8,
}
SCHEDULER = {
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
    "snr_shift_scale": 3.0,
    "clip_sample": False,
}


def write_folder(
    folder: Path,
    stock: type = STOCK,
    scheduler: type[CogVideoXDDIMScheduler] | type[CogVideoXDPMScheduler] = CogVideoXDDIMScheduler,
    vae: dict[str, Any] | None = None,
    **changes: Any,
) -> Path:
    """`vae` and `changes` are those of the VAE and of the transformer."""
    torch.manual_seed(0)
    for part, source in {"text_encoder": "text_encoder_2", "tokenizer": "tokenizer_2"}.items():
        (folder / part).symlink_to(MINI_FLUX / source)
    transformer = randomised(CogVideoXTransformer3DModel(**{**TRANSFORMER, **changes}), 1)
    if transformer.patch_embed.use_learned_positional_embeddings:
        # Like parameters, they are not those that a new module has.
        table = transformer.patch_embed.pos_embedding
        table.add_(normal(tuple(table.shape), 1, "table"), alpha=0.05)
    transformer.save_pretrained(folder / "transformer")
    randomised(AutoencoderKLCogVideoX(**{**VAE, **(vae or {})}), 2).save_pretrained(folder / "vae")
    scheduler(**SCHEDULER).save_pretrained(folder / "scheduler")
    parts = {
        "scheduler": scheduler,
        "vae": AutoencoderKLCogVideoX,
        "text_encoder": T5EncoderModel,
        "tokenizer": PreTrainedTokenizerFast,
        "transformer": CogVideoXTransformer3DModel,
    }
    write_index(folder, stock, parts)
    return folder


def pipeline(folder: Path, **options: Any) -> CogVideoXPipeline:
    options = {"dtype": "float32", **options}
    return CogVideoXPipeline(CogVideoXOptions(type="cogvideox", diffusers_path=folder, **options), seed=0)


def features(lengths: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Random text features, which are of full length whatever the text's is."""
    return {"t5": torch.stack([normal((TEXT_TOKENS, TEXT_WIDTH), 0, "text", length) for length in lengths])}


def whole(
    denoiser: CogVideoXTransformer3DModel,
    pipeline: CogVideoXPipeline,
    features: dict,
    x_t: torch.Tensor,
    t_B: torch.Tensor,
) -> torch.Tensor:
    return predicted(denoiser, features, x_t, t_B)


def predicted(
    denoiser: CogVideoXTransformer3DModel, features: dict, x_BCfhw: torch.Tensor, t_B: torch.Tensor
) -> torch.Tensor:
    """What the stock module gives for what the stock pipeline tells it."""
    stock, config, cell = STOCK.__new__(STOCK), denoiser.config, len(VAE["block_out_channels"])
    stock.__dict__.update(transformer=denoiser, vae_scale_factor_spatial=cell)
    frames, *sides = x_BCfhw.shape[2:]
    place = *(cell * side for side in sides), frames, torch.device("cpu")
    rotary = config.use_rotary_positional_embeddings
    (output,) = denoiser(
        rearrange(x_BCfhw, "b c f h w -> b f c h w"),
        features["t5"],
        (t_B * 1000).long(),
        image_rotary_emb=stock._prepare_rotary_positional_embeddings(*place) if rotary else None,
        ofs=torch.full((1,), 2.0) if config.ofs_embed_dim else None,
        return_dict=False,
    )
    return rearrange(output, "b f c h w -> b c f h w")


def prompt_features(stock: StockPipeline, captions: list[str]) -> list[dict[str, torch.Tensor]]:
    text_BLD, _ = stock.encode_prompt(
        captions, do_classifier_free_guidance=False, max_sequence_length=TEXT_TOKENS, device="cpu"
    )
    return [{"t5": text_LD} for text_LD in text_BLD]


def stock_latents(stock: StockPipeline, pixels_BCFHW: torch.Tensor) -> torch.Tensor:
    return stock.vae.encode(pixels_BCFHW).latent_dist.mode() * stock.vae_scaling_factor_image


def draw(stock: StockPipeline, sampling: SamplingSettings, noise: torch.Tensor, **keys: Any) -> torch.Tensor:
    """The noise is that whose numbers the stock pipeline would draw in its own order of dimensions."""
    channels, *grid = noise.shape[1:]
    keys = {"num_frames": sampling.frames, "max_sequence_length": TEXT_TOKENS, **keys}
    made = drawn(stock, sampling, noise.view(1, grid[0], channels, *grid[1:]), **keys).frames
    return rearrange(made, "b f c h w -> b c f h w")
