"""A whole tiny HunyuanVideo 1.5 of text to video in diffusers' layout, with random weights; Qwen2.5-VL is the tiny
Qwen-Image's, with more layers and without its vision, ByT5 the tiny HunyuanImage's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLHunyuanVideo15,
    ClassifierFreeGuidance,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideo15Transformer3DModel,
)
from diffusers import HunyuanVideo15Pipeline as StockPipeline
from diffusers.models.transformers.transformer_hunyuan_video15 import HunyuanVideo15AttnProcessor2_0
from transformers import ByT5Tokenizer, Qwen2_5_VLTextModel, Qwen2Tokenizer, T5Config, T5EncoderModel

from models.foundation.encoders.hunyuan_prompts import ASPECTS
from models.hunyuan_video_15 import HunyuanVideo15Options, HunyuanVideo15Pipeline
from tests.models import tiny_qwen_image
from tests.models.tiny_folder import ragged, randomised, write_index
from tests.models.tiny_hunyuan_image import BYT5, GLYPH_WIDTH
from utils.settings.run_tables import SamplingSettings

STOCK = StockPipeline
SIZES = [(64, 32, 1), (32, 48, 9)]
"""A still and a clip."""
SAMPLING = {
    "prompts": ['a sign that says "open"'],
    "width": 64,
    "height": 32,
    "frames": 5,
    "guidance": 3.0,
    "negative_prompt": "blurred",
}
TEXT_TOKENS, TEXT_WIDTH, CHANNELS, PICTURE_WIDTH = 128, tiny_qwen_image.TEXT_WIDTH, 4, 8
CUT = {"partition_method": "uniform"}
"""As for the tiny HunyuanImage."""
TRANSFORMER = {
    "in_channels": 2 * CHANNELS + 1,
    "out_channels": CHANNELS,
    "num_attention_heads": 2,
    "attention_head_dim": 20,
    "num_layers": 4,
    "num_refiner_layers": 2,
    "text_embed_dim": TEXT_WIDTH,
    "text_embed_2_dim": GLYPH_WIDTH,
    "image_embed_dim": PICTURE_WIDTH,
    "rope_axes_dim": (4, 8, 8),
    "target_size": 48,
}
VAE = {"latent_channels": CHANNELS, "block_out_channels": (8,) * 5, "layers_per_block": 1, "scaling_factor": 1.03682}
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tokenizer() -> Qwen2Tokenizer:
    """That of the tiny Qwen-Image, with the model's chat template. Most lines of the prompt are tokens, so that it is
    little longer than that of the real one."""
    made = tiny_qwen_image.tokenizer()
    made.add_tokens([ASPECTS[number] for number in (0, 1, 2, 4)])
    made.chat_template = CHAT_TEMPLATE
    return made


def write_folder(folder: Path, stock: type = STOCK, **changes: Any) -> Path:
    """The folder of one of the stock pipelines; `changes` are the transformer's."""
    torch.manual_seed(0)
    transformer = HunyuanVideo15Transformer3DModel(**{**TRANSFORMER, **changes})
    randomised(transformer, 1).save_pretrained(folder / "transformer")
    randomised(AutoencoderKLHunyuanVideo15(**VAE), 2).save_pretrained(folder / "vae")
    tokenizer().save_pretrained(folder / "tokenizer")
    text_encoder = tiny_qwen_image.text_encoder(layers=4).model.language_model
    text_encoder.save_pretrained(folder / "text_encoder")
    ByT5Tokenizer().save_pretrained(folder / "tokenizer_2")
    randomised(T5EncoderModel(T5Config(**BYT5)), 4).save_pretrained(folder / "text_encoder_2")
    FlowMatchEulerDiscreteScheduler(shift=5.0).save_pretrained(folder / "scheduler")
    ClassifierFreeGuidance(guidance_scale=SAMPLING["guidance"]).save_pretrained(folder / "guider")
    parts = {
        "scheduler": FlowMatchEulerDiscreteScheduler,
        "vae": AutoencoderKLHunyuanVideo15,
        "text_encoder": Qwen2_5_VLTextModel,
        "tokenizer": Qwen2Tokenizer,
        "text_encoder_2": T5EncoderModel,
        "tokenizer_2": ByT5Tokenizer,
        "transformer": HunyuanVideo15Transformer3DModel,
        "guider": ClassifierFreeGuidance,
    }
    write_index(folder, stock, parts)
    return folder


def pipeline(folder: Path, **options: Any) -> HunyuanVideo15Pipeline:
    options = {"dtype": "float32", "max_sequence_length": TEXT_TOKENS, **options}
    return HunyuanVideo15Pipeline(
        HunyuanVideo15Options(type="hunyuan_video_15", diffusers_path=folder, **options), seed=0
    )


def features(lengths: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Random text features of these many tokens each; the first caption of several quotes nothing."""
    glyphs = ragged("byt5", tuple(length // 2 for length in lengths), GLYPH_WIDTH)
    if len(lengths) > 1:
        glyphs["byt5_mask"][0] = False
    return {**ragged("qwen2_5_vl", lengths, TEXT_WIDTH), **glyphs}


def whole(
    denoiser: HunyuanVideo15Transformer3DModel,
    pipeline: HunyuanVideo15Pipeline,
    features: dict,
    x_t: torch.Tensor,
    t_B: torch.Tensor,
    picture_tokens: int = 0,
) -> torch.Tensor:
    """Without a picture, the stock pipeline gives so many tokens of zeros, which are masked: that they have no effect
    test_hunyuan_video_15.py shows."""
    for block in denoiser.transformer_blocks:
        block.attn.set_processor(HunyuanVideo15AttnProcessor2_0())
    seen, mask = torch.zeros_like(x_t), torch.zeros_like(x_t[:, :1])
    if "first_frame_latents" in features:
        seen[:, :, :1], mask[:, :, 0] = features["first_frame_latents"], 1
    return denoiser(
        hidden_states=torch.cat([x_t, seen, mask], dim=1),
        timestep=t_B * 1000,
        encoder_hidden_states=features["qwen2_5_vl"],
        encoder_attention_mask=features["qwen2_5_vl_mask"],
        encoder_hidden_states_2=features["byt5"],
        encoder_attention_mask_2=features["byt5_mask"],
        image_embeds=features.get("siglip_vision", torch.zeros(len(x_t), picture_tokens, PICTURE_WIDTH)),
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
    # It fails for several clips at once.
    stock.vae.enable_slicing()
    return stock.vae.encode(pixels_BCFHW).latent_dist.mode() * stock.vae.config.scaling_factor


def draw(stock: StockPipeline, sampling: SamplingSettings, noise: torch.Tensor, **keys: Any) -> torch.Tensor:
    stock.tokenizer_max_length = TEXT_TOKENS
    asked = {"prompt": sampling.prompts[0], "negative_prompt": sampling.negative_prompt, "latents": noise}
    asked |= {"num_frames": sampling.frames, "num_inference_steps": sampling.steps, "output_type": "latent"}
    size = {} if keys else {"width": sampling.width, "height": sampling.height}
    return stock(**asked, **size, **keys).frames
