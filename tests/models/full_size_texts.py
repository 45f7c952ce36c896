"""Text encoders at the sizes that people use, without files of weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import transformers

from utils.quantised.formats import FORMATS
from utils.quantised.linear import quantise

_T5_XXL = {
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
}
TEXT_ENCODERS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "T5-XXL: Stable Diffusion 3.5, Flux, Chroma, HiDream, LTX-Video": (
        "T5EncoderModel",
        {**_T5_XXL, "vocab_size": 32128},
    ),
    "T5-11B: Cosmos 1.0, Cosmos-Predict2": (
        "T5EncoderModel",
        {"vocab_size": 32128, "d_model": 1024, "d_kv": 128, "d_ff": 65536, "num_layers": 24, "num_heads": 128},
    ),
    "UMT5-XXL: Wan": ("UMT5EncoderModel", {**_T5_XXL, "vocab_size": 256384}),
    "mT5-XL: HunyuanDiT": (
        "T5EncoderModel",
        {**_T5_XXL, "vocab_size": 250112, "d_model": 2048, "d_ff": 5120, "num_heads": 32},
    ),
    "Llama 3 8B: HiDream, HunyuanVideo": (
        "LlamaModel",
        {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_key_value_heads": 8},
    ),
    "Qwen2.5-VL 7B: Qwen-Image, HunyuanImage, HunyuanVideo 1.5, Cosmos-Predict2.5": (
        "Qwen2_5_VLModel",
        {
            "text_config": {
                "vocab_size": 152064,
                "hidden_size": 3584,
                "intermediate_size": 18944,
                "num_hidden_layers": 28,
                "num_attention_heads": 28,
                "num_key_value_heads": 4,
            },
            "vision_config": {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "out_hidden_size": 3584},
        },
    ),
    "Gemma 2 2B: Lumina 2": ("Gemma2Model", {}),
    "GLM-4 9B: CogView4": ("GlmModel", {}),
    "Qwen3-VL 4B: Krea 2": (
        "Qwen3VLModel",
        {
            "text_config": {
                "vocab_size": 151936,
                "hidden_size": 2560,
                "intermediate_size": 9728,
                "num_hidden_layers": 36,
                "num_attention_heads": 32,
                "num_key_value_heads": 8,
            },
            "vision_config": {
                "depth": 24,
                "hidden_size": 1024,
                "intermediate_size": 4096,
                "out_hidden_size": 2560,
                "deepstack_visual_indexes": [5, 11, 17],
            },
        },
    ),
    "Qwen3-VL 8B: Ideogram 4": (
        "Qwen3VLModel",
        {
            "text_config": {
                "vocab_size": 151936,
                "hidden_size": 4096,
                "intermediate_size": 12288,
                "num_hidden_layers": 36,
                "num_attention_heads": 32,
                "num_key_value_heads": 8,
            },
            "vision_config": {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "out_hidden_size": 4096},
        },
    ),
    "Qwen3 0.6B: Anima": (
        "Qwen3Model",
        {
            "vocab_size": 151936,
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
        },
    ),
    "Qwen3 4B: Z-Image": (
        "Qwen3Model",
        {
            "vocab_size": 151936,
            "hidden_size": 2560,
            "intermediate_size": 9728,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
        },
    ),
}
"""Text encoders and who reads them: their class, and what of the configuration is not the class's default."""


def text_encoder_bytes(name: str, kept: str | None) -> int:
    """Bytes of a text encoder's weights in bfloat16, or with its Linears in this format; it is built without memory."""
    from models.foundation.encoders.quantised import linears_of_blocks

    class_name, config = TEXT_ENCODERS[name]
    stock = getattr(transformers, class_name)
    with torch.device("meta"):
        model = stock(stock.config_class(**config)).to(torch.bfloat16)
    if kept:
        quantise(model, list(linears_of_blocks(model)), FORMATS[kept])
    return sum(part.nbytes for part in (*model.parameters(), *model.buffers()))
