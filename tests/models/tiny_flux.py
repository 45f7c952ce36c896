"""A whole tiny Flux in diffusers' layout: the examples' miniature with a transformer and a scheduler of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from diffusers import FluxPipeline as StockPipeline

from models.flux import FluxOptions, FluxPipeline
from tests.models.tiny_folder import drawn
from utils.diffusion.seeds import normal
from utils.settings.run_tables import SamplingSettings

STOCK = StockPipeline
SAMPLING = {"width": 96, "height": 64, "guidance": 2.5}
MINI_FLUX = Path(__file__).resolve().parents[2] / "examples" / "mini_flux"
TEXT_TOKENS = 16
CONFIG = {
    "patch_size": 1,
    "in_channels": 16,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 64,
    "pooled_projection_dim": 32,
    "guidance_embeds": True,
    "axes_dims_rope": [4, 4, 8],
}


def transformer(**changes: Any) -> FluxTransformer2DModel:
    """Random weights, those of the norms too: with ones, a query's norm could stand for a key's."""
    torch.manual_seed(0)
    denoiser = FluxTransformer2DModel(**{**CONFIG, **changes})
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return denoiser


def write_folder(folder: Path, *, scheduler: dict[str, Any] | None = None, **changes: Any) -> Path:
    """A diffusers folder with this transformer and scheduler; the other parts are the miniature's own."""
    for part in (
        *(MINI_FLUX / name for name in ("model_index.json", "vae")),
        *MINI_FLUX.glob("t*_encoder*"),
        *MINI_FLUX.glob("tokenizer*"),
    ):
        (folder / part.name).symlink_to(part)
    transformer(**changes).save_pretrained(folder / "transformer")
    FlowMatchEulerDiscreteScheduler(**(scheduler or {})).save_pretrained(folder / "scheduler")
    return folder


def pipeline(folder: Path, **options: Any) -> FluxPipeline:
    options = {"dtype": "float32", "max_sequence_length": TEXT_TOKENS, **options}
    return FluxPipeline(FluxOptions(type="flux", diffusers_path=folder, **options), seed=0)


def features(lengths: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Random text features; they have all the same number of tokens."""
    return {
        "t5": normal((len(lengths), TEXT_TOKENS, 64), 0, "text", *lengths),
        "clip_pooled": normal((len(lengths), 32), 0, "pooled", *lengths),
    }


def whole(
    denoiser: FluxTransformer2DModel, pipeline: FluxPipeline, features: dict, x_t: torch.Tensor, t_B: torch.Tensor
) -> torch.Tensor:
    height, width = x_t.shape[2:]
    (output_BTC,) = denoiser(
        hidden_states=StockPipeline._pack_latents(x_t, *x_t.shape),
        encoder_hidden_states=features["t5"],
        pooled_projections=features["clip_pooled"],
        timestep=t_B,
        guidance=torch.ones(len(t_B)),
        img_ids=StockPipeline._prepare_latent_image_ids(None, height // 2, width // 2, "cpu", torch.float32),
        txt_ids=torch.zeros(features["t5"].shape[1], 3),
        return_dict=False,
    )
    return StockPipeline._unpack_latents(output_BTC, height * 8, width * 8, 8)


def prompt_features(stock: StockPipeline, captions: list[str]) -> list[dict[str, torch.Tensor]]:
    text_BLD, pooled_BD, _ = stock.encode_prompt(captions, None, max_sequence_length=TEXT_TOKENS, device="cpu")
    return [{"t5": text_LD, "clip_pooled": pooled_D} for text_LD, pooled_D in zip(text_BLD, pooled_BD, strict=True)]


def stock_latents(stock: Any, pixels_BCFHW: torch.Tensor) -> torch.Tensor:
    latents = stock.vae.encode(pixels_BCFHW[:, :, 0]).latent_dist.mode()
    return (latents - (stock.vae.config.shift_factor or 0.0)) * stock.vae.config.scaling_factor


def draw(stock: Any, sampling: SamplingSettings, noise: torch.Tensor, **keys: Any) -> torch.Tensor:
    # Guidance is its input.
    keys = {"negative_prompt": None, "max_sequence_length": TEXT_TOKENS, **keys}
    tokens_BTC = drawn(stock, sampling, stock._pack_latents(noise, *noise.shape), **keys).images
    return stock._unpack_latents(tokens_BTC, sampling.height, sampling.width, 8)
