"""A whole tiny Stable Diffusion 3.5 medium in diffusers' layout: the miniature Flux's VAE, T5 and words, with CLIPs and
a transformer of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from diffusers import StableDiffusion3Pipeline as StockPipeline
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    T5EncoderModel,
)

from models.foundation.encoders.text import load_tokenizer
from models.sd3 import Sd3Options, Sd3Pipeline
from tests.models import tiny_flux
from tests.models.tiny_flux import MINI_FLUX
from tests.models.tiny_folder import drawn, randomised, write_index
from utils.diffusion.seeds import normal
from utils.settings.run_tables import SamplingSettings

STOCK = StockPipeline
SAMPLING = {"width": 96, "height": 64, "guidance": 4.0, "negative_prompt": "blurred"}
TEXT_TOKENS, CLIP_L_WIDTH, CLIP_G_WIDTH, T5_WIDTH = 16, 16, 24, 64
TRANSFORMER = {
    "sample_size": 8,
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 3,
    "attention_head_dim": 8,
    "num_attention_heads": 4,
    "caption_projection_dim": 32,
    "joint_attention_dim": T5_WIDTH,
    "pooled_projection_dim": CLIP_L_WIDTH + CLIP_G_WIDTH,
    "pos_embed_max_size": 12,
    "dual_attention_layers": (0, 1),
    "qk_norm": "rms_norm",
}


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


def write_folder(folder: Path, **changes: Any) -> Path:
    """`changes` are the transformer's. Its table of positions is not the one that is computed."""
    torch.manual_seed(0)
    sources = {"vae": "vae", "tokenizer": "tokenizer", "text_encoder_3": "text_encoder_2", "tokenizer_3": "tokenizer_2"}
    for part, source in sources.items():
        (folder / part).symlink_to(MINI_FLUX / source)
    # As CLIP-G's, which does not fill up with the token that ends a caption.
    words = load_tokenizer(MINI_FLUX / "tokenizer")
    words.pad_token = "!"
    words.save_pretrained(folder / "tokenizer_2")
    clip_l, clip_g = clip_config(CLIP_L_WIDTH), clip_config(CLIP_G_WIDTH, hidden_act="gelu", num_hidden_layers=4)
    randomised(CLIPTextModelWithProjection(clip_l), 2).save_pretrained(folder / "text_encoder")
    randomised(CLIPTextModelWithProjection(clip_g), 3).save_pretrained(folder / "text_encoder_2")
    transformer = randomised(SD3Transformer2DModel(**{**TRANSFORMER, **changes}), 1)
    transformer.pos_embed.pos_embed += normal(transformer.pos_embed.pos_embed.shape, 0, "positions")
    transformer.save_pretrained(folder / "transformer")
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(folder / "scheduler")
    parts = {
        "scheduler": FlowMatchEulerDiscreteScheduler,
        "text_encoder": CLIPTextModelWithProjection,
        "text_encoder_2": CLIPTextModelWithProjection,
        "text_encoder_3": T5EncoderModel,
        "tokenizer": CLIPTokenizer,
        "tokenizer_2": CLIPTokenizer,
        "tokenizer_3": PreTrainedTokenizerFast,
        "transformer": SD3Transformer2DModel,
        "vae": AutoencoderKL,
        "feature_extractor": None,
        "image_encoder": None,
    }
    write_index(folder, STOCK, parts)
    return folder


def pipeline(folder: Path, **options: Any) -> Sd3Pipeline:
    options = {"dtype": "float32", "max_sequence_length": TEXT_TOKENS, **options}
    return Sd3Pipeline(Sd3Options(type="sd3", diffusers_path=folder, **options), seed=0)


def features(lengths: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Random text features; they have all the same number of tokens."""
    shapes = {
        "clip_l": (77, CLIP_L_WIDTH),
        "clip_l_pooled": (CLIP_L_WIDTH,),
        "clip_g": (77, CLIP_G_WIDTH),
        "clip_g_pooled": (CLIP_G_WIDTH,),
        "t5": (TEXT_TOKENS, T5_WIDTH),
    }
    return {name: normal((len(lengths), *shape), 0, name, *lengths) for name, shape in shapes.items()}


def whole(
    denoiser: SD3Transformer2DModel, pipeline: Sd3Pipeline, features: dict, x_t: torch.Tensor, t_B: torch.Tensor
) -> torch.Tensor:
    clip_BLD = torch.cat([features["clip_l"], features["clip_g"]], dim=-1)
    clip_BLD = torch.nn.functional.pad(clip_BLD, (0, T5_WIDTH - clip_BLD.shape[-1]))
    return denoiser(
        hidden_states=x_t,
        timestep=t_B * 1000,
        encoder_hidden_states=torch.cat([clip_BLD, features["t5"]], dim=-2),
        pooled_projections=torch.cat([features["clip_l_pooled"], features["clip_g_pooled"]], dim=-1),
        return_dict=False,
    )[0]


def prompt_features(stock: StockPipeline, captions: list[str]) -> list[dict[str, torch.Tensor]]:
    made = {"t5": stock._get_t5_prompt_embeds(captions, max_sequence_length=TEXT_TOKENS)}
    for index, name in enumerate(("clip_l", "clip_g")):
        made[name], made[f"{name}_pooled"] = stock._get_clip_prompt_embeds(captions, clip_model_index=index)
    return [{name: feature[number] for name, feature in made.items()} for number in range(len(captions))]


stock_latents = tiny_flux.stock_latents


def draw(stock: StockPipeline, sampling: SamplingSettings, noise: torch.Tensor) -> torch.Tensor:
    return drawn(stock, sampling, noise, max_sequence_length=TEXT_TOKENS).images
