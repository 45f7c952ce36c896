"""A whole tiny Krea 2 in diffusers' layout, with random weights; VAE and tokenizer are tiny Qwen-Image's."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import AutoencoderKLQwenImage, FlowMatchEulerDiscreteScheduler, Krea2Transformer2DModel
from diffusers import Krea2Pipeline as StockPipeline
from transformers import Qwen2Tokenizer, Qwen3VLConfig, Qwen3VLModel

from models.krea2 import Krea2Options, Krea2Pipeline
from tests.models import tiny_qwen_image
from tests.models.tiny_folder import drawn, of_true_length, ragged, randomised, write_index
from utils.settings.run_tables import SamplingSettings

STOCK = StockPipeline
SAMPLING = {"width": 96, "height": 64, "guidance": 2.0, "negative_prompt": "blurred"}
TEXT_TOKENS, CHANNELS, LAYERS = 256, tiny_qwen_image.CHANNELS, (0, 2)
"""With a byte a token, the template takes 170 after those that are skipped."""
CUT = {"partition_method": "uniform"}
"""Its time and its text weigh more than its blocks."""
SIDES = SimpleNamespace(patch_size=2, vae_scale_factor=8)
"""What methods of the stock pipeline ask it for."""
TRANSFORMER = {
    "in_channels": 4 * CHANNELS,
    "num_layers": 4,
    "attention_head_dim": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "timestep_embed_dim": 8,
    "text_hidden_dim": 16,
    "num_text_layers": len(LAYERS),
    "text_num_attention_heads": 2,
    "text_num_key_value_heads": 1,
    "text_intermediate_size": 24,
    "num_layerwise_text_blocks": 1,
    "num_refiner_text_blocks": 1,
    "axes_dims_rope": (4, 2, 2),
}
SCHEDULER = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15, "max_image_seq_len": 6400}


def text_encoder(width: int = 16, layers: int = 3) -> Qwen3VLModel:
    """Qwen3-VL with a tiny eye that nothing reads."""
    number = tiny_qwen_image.tokenizer().convert_tokens_to_ids
    config = Qwen3VLConfig(
        text_config={
            "vocab_size": 300,
            "hidden_size": width,
            "intermediate_size": 32,
            "num_hidden_layers": layers,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 8,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
        },
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": width,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0],
        },
        image_token_id=number("<|image_pad|>"),
        video_token_id=number("<|video_pad|>"),
        vision_start_token_id=number("<|vision_start|>"),
        vision_end_token_id=number("<|vision_end|>"),
    )
    return randomised(Qwen3VLModel(config), 3)


def write_folder(folder: Path, *, index: dict[str, Any] | None = None, **changes: Any) -> Path:
    """`index` is what `model_index.json` says beside its parts, `changes` are the transformer's."""
    torch.manual_seed(0)
    tiny_qwen_image.tokenizer().save_pretrained(folder / "tokenizer")
    randomised(Krea2Transformer2DModel(**{**TRANSFORMER, **changes}), 1).save_pretrained(folder / "transformer")
    randomised(AutoencoderKLQwenImage(**tiny_qwen_image.VAE), 2).save_pretrained(folder / "vae")
    text_encoder().save_pretrained(folder / "text_encoder")
    FlowMatchEulerDiscreteScheduler(**SCHEDULER).save_pretrained(folder / "scheduler")
    parts = {
        "scheduler": FlowMatchEulerDiscreteScheduler,
        "text_encoder": Qwen3VLModel,
        "tokenizer": Qwen2Tokenizer,
        "transformer": Krea2Transformer2DModel,
        "vae": AutoencoderKLQwenImage,
    }
    write_index(folder, STOCK, parts, **{"text_encoder_select_layers": LAYERS, **(index or {})})
    return folder


def pipeline(folder: Path, **options: Any) -> Krea2Pipeline:
    options = {"dtype": "float32", "max_sequence_length": TEXT_TOKENS, **options}
    return Krea2Pipeline(Krea2Options(type="krea2", diffusers_path=folder, **options), seed=0)


def features(lengths: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Random text features of these many tokens each."""
    return ragged("qwen3_vl", lengths, len(LAYERS) * TRANSFORMER["text_hidden_dim"])


def whole(
    denoiser: Krea2Transformer2DModel, pipeline: Krea2Pipeline, features: dict, x_t: torch.Tensor, t_B: torch.Tensor
) -> torch.Tensor:
    text_BLF, mask_BL = features["qwen3_vl"], features["qwen3_vl_mask"].bool()
    height, width = x_t.shape[3:]
    tokens_BTC = StockPipeline._pack_latents(SIDES, x_t, len(x_t), CHANNELS, height, width)
    (output_BTC,) = denoiser(
        hidden_states=tokens_BTC,
        encoder_hidden_states=text_BLF.unflatten(-1, (len(LAYERS), -1)),
        timestep=t_B,
        position_ids=StockPipeline.prepare_position_ids(text_BLF.shape[1], height // 2, width // 2, "cpu"),
        encoder_attention_mask=None if mask_BL.all() else mask_BL,
        return_dict=False,
    )
    return StockPipeline._unpack_latents(SIDES, output_BTC, height * 8, width * 8)


def prompt_features(stock: StockPipeline, captions: list[str]) -> list[dict[str, torch.Tensor]]:
    text_BLKD, mask_BL = stock.encode_prompt(captions, "cpu", max_sequence_length=TEXT_TOKENS)
    rows = [text_LKD[mask_L].flatten(1) for text_LKD, mask_L in zip(text_BLKD, mask_BL, strict=True)]
    return of_true_length("qwen3_vl", rows, mask_BL.sum(1).tolist())


stock_latents = tiny_qwen_image.stock_latents


def draw(stock: StockPipeline, sampling: SamplingSettings, noise: torch.Tensor) -> torch.Tensor:
    height, width = noise.shape[3:]
    tokens_BTC = stock._pack_latents(noise, 1, CHANNELS, height, width)
    tokens_BTC = drawn(stock, sampling, tokens_BTC, max_sequence_length=TEXT_TOKENS).images
    return stock._unpack_latents(tokens_BTC, sampling.height, sampling.width)
