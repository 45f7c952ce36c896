"""A whole tiny HunyuanImage 2.1 in diffusers' layout, with random weights; Qwen2.5-VL is the tiny Qwen-Image's, with
more layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AdaptiveProjectedMixGuidance,
    AutoencoderKLHunyuanImage,
    FlowMatchEulerDiscreteScheduler,
    HunyuanImageTransformer2DModel,
)
from diffusers import HunyuanImagePipeline as StockPipeline
from transformers import ByT5Tokenizer, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer, T5Config, T5EncoderModel

from models.hunyuan_image import HunyuanImageOptions, HunyuanImagePipeline
from tests.models import tiny_qwen_image
from tests.models.tiny_folder import ragged, randomised, write_index
from utils.settings.run_tables import SamplingSettings

STOCK = StockPipeline
SIZES = [(64, 96, 1), (128, 64, 1)]
SAMPLING = {
    "prompts": ['a sign that says "open"'],
    "width": 96,
    "height": 64,
    "guidance": 3.0,
    "negative_prompt": "blurred",
}
TEXT_TOKENS, TEXT_WIDTH, GLYPH_WIDTH, CHANNELS = 256, tiny_qwen_image.TEXT_WIDTH, 8, 4
CUT = {"partition_method": "uniform"}
"""The embedder of quoted texts has a fixed width, at which it takes more parameters than all tiny blocks."""
TRANSFORMER = {
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "num_attention_heads": 2,
    "attention_head_dim": 24,
    "num_layers": 2,
    "num_single_layers": 2,
    "num_refiner_layers": 2,
    "text_embed_dim": TEXT_WIDTH,
    "text_embed_2_dim": GLYPH_WIDTH,
    "rope_axes_dim": (12, 12),
}
VAE = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": CHANNELS,
    "block_out_channels": (32,) * 6,
    "layers_per_block": 1,
    "spatial_compression_ratio": 32,
    "sample_size": 384,
    "scaling_factor": 0.75289,
}
BYT5 = {"vocab_size": 384, "d_model": GLYPH_WIDTH, "d_kv": 4, "d_ff": 16, "num_layers": 2, "num_heads": 2}


def write_folder(folder: Path, **changes: Any) -> Path:
    """`changes` are the transformer's."""
    torch.manual_seed(0)
    transformer = HunyuanImageTransformer2DModel(**{**TRANSFORMER, **changes})
    randomised(transformer, 1).save_pretrained(folder / "transformer")
    randomised(AutoencoderKLHunyuanImage(**VAE), 2).save_pretrained(folder / "vae")
    tiny_qwen_image.tokenizer().save_pretrained(folder / "tokenizer")
    tiny_qwen_image.text_encoder(layers=4).save_pretrained(folder / "text_encoder")
    ByT5Tokenizer().save_pretrained(folder / "tokenizer_2")
    randomised(T5EncoderModel(T5Config(**BYT5)), 4).save_pretrained(folder / "text_encoder_2")
    FlowMatchEulerDiscreteScheduler(shift=5.0).save_pretrained(folder / "scheduler")
    for name in ("guider", "ocr_guider"):
        AdaptiveProjectedMixGuidance(guidance_scale=SAMPLING["guidance"]).save_pretrained(folder / name)
    parts = {
        "scheduler": FlowMatchEulerDiscreteScheduler,
        "vae": AutoencoderKLHunyuanImage,
        "text_encoder": Qwen2_5_VLForConditionalGeneration,
        "tokenizer": Qwen2Tokenizer,
        "text_encoder_2": T5EncoderModel,
        "tokenizer_2": ByT5Tokenizer,
        "transformer": HunyuanImageTransformer2DModel,
        "guider": AdaptiveProjectedMixGuidance,
        "ocr_guider": AdaptiveProjectedMixGuidance,
    }
    write_index(folder, STOCK, parts)
    return folder


def pipeline(folder: Path, **options: Any) -> HunyuanImagePipeline:
    options = {"dtype": "float32", "max_sequence_length": TEXT_TOKENS, **options}
    return HunyuanImagePipeline(HunyuanImageOptions(type="hunyuan_image", diffusers_path=folder, **options), seed=0)


def features(lengths: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Random text features of these many tokens each; every second caption quotes nothing."""
    glyphs = ragged("byt5", tuple(length // 2 for length in lengths), GLYPH_WIDTH)
    if len(lengths) > 1:
        glyphs["byt5_mask"][0] = False
    return {**ragged("qwen2_5_vl", lengths, TEXT_WIDTH), **glyphs}


def whole(
    denoiser: HunyuanImageTransformer2DModel,
    pipeline: HunyuanImagePipeline,
    features: dict,
    x_t: torch.Tensor,
    t_B: torch.Tensor,
) -> torch.Tensor:
    return denoiser(
        hidden_states=x_t,
        timestep=t_B * 1000,
        encoder_hidden_states=features["qwen2_5_vl"],
        encoder_attention_mask=features["qwen2_5_vl_mask"],
        encoder_hidden_states_2=features["byt5"],
        encoder_attention_mask_2=features["byt5_mask"],
        return_dict=False,
    )[0]


def prompt_features(stock: StockPipeline, captions: list[str]) -> list[dict[str, torch.Tensor]]:
    stock.tokenizer_max_length, made = TEXT_TOKENS, []
    for caption in captions:
        (text_LD,), (mask_L,), (glyphs_LD,), (glyph_mask_L,) = stock.encode_prompt([caption], "cpu")
        # A caption without quoted texts keeps one of its rows of zeros.
        kept = max(1, int(glyph_mask_L.sum()))
        made.append(
            {
                "qwen2_5_vl": text_LD[mask_L.bool()],
                "qwen2_5_vl_mask": mask_L[mask_L.bool()].bool(),
                "byt5": glyphs_LD[:kept],
                "byt5_mask": glyph_mask_L[:kept].bool(),
            }
        )
    return made


def stock_latents(stock: StockPipeline, pixels_BCFHW: torch.Tensor) -> torch.Tensor:
    return stock.vae.encode(pixels_BCFHW[:, :, 0]).latent_dist.mode() * stock.vae.config.scaling_factor


def draw(stock: StockPipeline, sampling: SamplingSettings, noise: torch.Tensor) -> torch.Tensor:
    stock.tokenizer_max_length = TEXT_TOKENS
    asked = {"prompt": sampling.prompts[0], "negative_prompt": sampling.negative_prompt, "latents": noise}
    asked |= {"width": sampling.width, "height": sampling.height, "num_inference_steps": sampling.steps}
    return stock(**asked, output_type="latent").images
