"""A whole tiny SDXL in diffusers' layout: the miniature Flux's words, the rest of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, UNet2DConditionModel
from diffusers import StableDiffusionXLPipeline as StockPipeline
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from models.foundation.encoders.text import load_tokenizer
from models.foundation.layers.ensemble import Ensemble
from models.sdxl import SdxlOptions, SdxlPipeline
from tests.models import tiny_sd15
from tests.models.tiny_flux import MINI_FLUX
from tests.models.tiny_folder import randomised, write_index
from tests.models.tiny_sd15 import NOISE, SAMPLING, clip_config, draw, stock_latents
from utils.diffusion.seeds import normal

__all__ = ["SAMPLING", "draw", "stock_latents"]

STOCK = StockPipeline
CLIP_L_WIDTH, CLIP_G_WIDTH, POOLED_WIDTH = 16, 24, 20
SIZES_OF_PICTURES = [[480.0, 640.0, 0.0, 12.0, 64.0, 64.0], [1001.0, 999.0, 3.0, 0.0, 64.0, 64.0]]
UNET = {
    **tiny_sd15.UNET,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": CLIP_L_WIDTH + CLIP_G_WIDTH,
    "attention_head_dim": (2, 4),
    "transformer_layers_per_block": (1, 2),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": POOLED_WIDTH + 6 * 8,
}


def write_folder(folder: Path, **changes: Any) -> Path:
    """`changes` are the UNet's."""
    torch.manual_seed(0)
    (folder / "tokenizer").symlink_to(MINI_FLUX / "tokenizer")
    # As OpenCLIP's, which does not fill up with the token that ends a caption.
    words = load_tokenizer(MINI_FLUX / "tokenizer")
    words.pad_token = "!"
    words.save_pretrained(folder / "tokenizer_2")
    tiny_sd15.write_vae(folder)
    clip_g = clip_config(CLIP_G_WIDTH, hidden_act="gelu", num_hidden_layers=4, projection_dim=POOLED_WIDTH)
    randomised(CLIPTextModel(clip_config(CLIP_L_WIDTH)), 2).save_pretrained(folder / "text_encoder")
    randomised(CLIPTextModelWithProjection(clip_g), 3).save_pretrained(folder / "text_encoder_2")
    randomised(UNet2DConditionModel(**{**UNET, **changes}), 1).save_pretrained(folder / "unet")
    EulerDiscreteScheduler(**NOISE, timestep_spacing="leading").save_pretrained(folder / "scheduler")
    parts = {
        "scheduler": EulerDiscreteScheduler,
        "text_encoder": CLIPTextModel,
        "text_encoder_2": CLIPTextModelWithProjection,
        "tokenizer": CLIPTokenizer,
        "tokenizer_2": CLIPTokenizer,
        "unet": UNet2DConditionModel,
        "vae": AutoencoderKL,
        "feature_extractor": None,
        "image_encoder": None,
    }
    write_index(folder, STOCK, parts, force_zeros_for_empty_prompt=True)
    return folder


def pipeline(folder: Path, **options: Any) -> SdxlPipeline:
    return SdxlPipeline(SdxlOptions(type="sdxl", diffusers_path=folder, **{"dtype": "float32", **options}), seed=0)


def features(lengths: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Random text features; they have all the same number of tokens."""
    shapes = {"clip_l": (77, CLIP_L_WIDTH), "clip_g": (77, CLIP_G_WIDTH), "clip_g_pooled": (POOLED_WIDTH,)}
    texts = {name: normal((len(lengths), *shape), 0, name, *lengths) for name, shape in shapes.items()}
    return {**texts, "size_ids": torch.tensor(SIZES_OF_PICTURES[: len(lengths)])}


def whole(
    denoiser: Ensemble | UNet2DConditionModel,
    pipeline: SdxlPipeline,
    features: dict,
    x_t: torch.Tensor,
    t_B: torch.Tensor,
) -> torch.Tensor:
    unet = getattr(denoiser, "unet", denoiser)
    return unet(
        x_t,
        (t_B * 1000).long(),
        encoder_hidden_states=torch.cat([features["clip_l"], features["clip_g"]], dim=-1),
        added_cond_kwargs={"text_embeds": features["clip_g_pooled"], "time_ids": features["size_ids"]},
        return_dict=False,
    )[0]


def prompt_features(stock: StockPipeline, captions: list[str]) -> list[dict[str, torch.Tensor]]:
    text_BLD, _, pooled_BP, _ = stock.encode_prompt(captions, device="cpu", do_classifier_free_guidance=False)
    clip_l_BLD, clip_g_BLD = text_BLD.split([CLIP_L_WIDTH, CLIP_G_WIDTH], dim=-1)
    named = {"clip_l": clip_l_BLD, "clip_g": clip_g_BLD, "clip_g_pooled": pooled_BP}
    return [{name: feature[number] for name, feature in named.items()} for number in range(len(captions))]
