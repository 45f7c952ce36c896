"""Text encoders at the sizes that people use: who reads them, and what their weights take."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import transformers

from models.foundation.checkpoints.published import CONFIGS
from models.foundation.encoders.text import VISION_LAYERS
from utils.quantised.formats import FORMATS
from utils.quantised.linear import quantise


class Published(NamedTuple):
    """A text encoder as it is built to read captions alone.

    Attributes:
        class_name: of transformers.
        config: its file in `configs/shared/text_encoder`, or its configuration.
        layers_kept: how many of its layers are built; 0 for all.
    """

    class_name: str
    config: str | Mapping[str, Any]
    layers_kept: int = 0


QWEN3_VL_8B = {
    "text_config": {
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "vision_config": {"out_hidden_size": 4096},
}
QWEN3_VL_32B = {
    "text_config": {
        **QWEN3_VL_8B["text_config"],
        "hidden_size": 5120,
        "intermediate_size": 25600,
        "num_hidden_layers": 64,
        "num_attention_heads": 64,
    },
    "vision_config": {"out_hidden_size": 5120},
}
GEMMA3_12B = {
    "text_config": {
        "vocab_size": 262208,
        "hidden_size": 3840,
        "intermediate_size": 15360,
        "num_hidden_layers": 48,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 256,
    },
    "vision_config": {
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_attention_heads": 16,
        "image_size": 896,
        "patch_size": 14,
    },
}
TEXT_ENCODERS: Mapping[str, Published] = {
    "T5-XXL: Stable Diffusion 3.5, Flux, Chroma, HiDream, PixArt, LTX-Video, CogVideoX, Mochi": Published(
        "T5EncoderModel", "t5_xxl"
    ),
    "T5-11B: Cosmos 1.0, Cosmos-Predict2": Published("T5EncoderModel", "t5_11b"),
    "UMT5-XXL: Wan": Published("UMT5EncoderModel", "umt5_xxl"),
    "mT5-XL: HunyuanDiT": Published("MT5EncoderModel", "mt5_xl"),
    "Llama 3 8B: HiDream, HunyuanVideo": Published("LlamaModel", "llama3_1_8b"),
    "Qwen2.5-VL 7B: Qwen-Image, HunyuanImage, HunyuanVideo 1.5, Kandinsky 5, Cosmos-Predict2.5": Published(
        "Qwen2_5_VLModel", "qwen2_5_vl_7b"
    ),
    "Qwen2.5-VL 3B: OmniGen2": Published("Qwen2_5_VLModel", "qwen2_5_vl_3b"),
    "Qwen3-VL 4B: Krea 2, Flux.3": Published("Qwen3VLModel", "qwen3_vl_4b"),
    "Qwen3-VL 8B: Qwen-Image 2.1, Ideogram 4": Published("Qwen3VLModel", QWEN3_VL_8B),
    "Qwen3-VL 32B: MiniMax-H3": Published("Qwen3VLModel", QWEN3_VL_32B, 51),
    "Gemma 2 2B: Lumina 2, Sana": Published("Gemma2Model", "gemma2_2b"),
    "Gemma 3 12B: LTX-2, whose connectors are 3 GB more": Published("Gemma3Model", GEMMA3_12B),
    "GLM-4 9B: CogView4": Published("GlmModel", {}),
    "Qwen3 0.6B: Anima": Published("Qwen3Model", "qwen3_0.6b"),
    "Qwen3 4B: Z-Image": Published("Qwen3Model", "qwen3_4b"),
    "Qwen3 4B: Flux.2 Klein 4B": Published("Qwen3Model", "qwen3_4b", 28),
    "Qwen3 8B: Flux.2 Klein 9B": Published("Qwen3Model", "qwen3_8b", 28),
    "Mistral Small 3 24B: Flux.2 dev": Published("Mistral3Model", "mistral_small_3_24b", 31),
}
"""By name, and who reads them."""


def text_encoder_bytes(name: str, kept: str | None) -> int:
    """Bytes of a text encoder's weights in bfloat16, or with its Linears in this format; it is built without memory."""
    from models.foundation.encoders.quantised import linears_of_blocks

    class_name, config, layers = TEXT_ENCODERS[name]
    if isinstance(config, str):
        config = json.loads((CONFIGS / "shared" / "text_encoder" / f"{config}.json").read_text())
    stock = getattr(transformers, class_name)
    made = stock.config_class.from_dict(config)
    text, vision = made.get_text_config(), getattr(made, "vision_config", None)
    text.num_hidden_layers = layers or text.num_hidden_layers
    for key in VISION_LAYERS:
        if vision is not None and hasattr(vision, key):
            setattr(vision, key, 0)
    with torch.device("meta"):
        model = stock(made).to(torch.bfloat16)
    if kept:
        quantise(model, list(linears_of_blocks(model)), FORMATS[kept])
    return sum(part.nbytes for part in (*model.parameters(), *model.buffers()))
