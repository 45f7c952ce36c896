"""Denoisers at the sizes that people train, as pipelines without files of weights.

Shapes: a feature by name, without the batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import transformers

from tests.models.full_size_clips import (
    COSMOS_1,
    COSMOS_PREDICT2,
    COSMOS_PREDICT2_14B,
    COSMOS_PREDICT25,
    HUNYUAN_VIDEO,
    HUNYUAN_VIDEO_15,
    LTX_VIDEO,
    LTX_VIDEO_13B,
    WAN,
    WAN_SMALL,
)
from tests.models.full_size_pictures import FLUX2_VAE, FLUX3, QWEN_IMAGE_21, SANA
from tests.models.sized import FullSize, pooled_of, text_of, vae_of, video_vae_of
from utils.quantised.formats import FORMATS
from utils.quantised.linear import quantise

VAE16 = vae_of(16, shift_factor=0.1)
CLIPS = {"clip_l": ((77, 768), torch.bfloat16), "clip_g": ((77, 1280), torch.bfloat16)}
UNET = {"_class_name": "UNet2DConditionModel", "sample_size": 64}
EPSILON = {"_class_name": "EulerDiscreteScheduler", "beta_schedule": "scaled_linear", "prediction_type": "epsilon"}
V_PREDICTION = {"_class_name": "DDPMScheduler", "beta_schedule": "scaled_linear", "prediction_type": "v_prediction"}

SD15 = FullSize(
    "Stable Diffusion 1.5",
    "sd15",
    {
        "unet": {**UNET, "cross_attention_dim": 768, "attention_head_dim": 8},
        "vae": vae_of(4),
        "scheduler": EPSILON,
    },
    {"clip_l": ((77, 768), torch.bfloat16)},
    (512, 512, 1),
)
SDXL = FullSize(
    "SDXL",
    "sdxl",
    {
        "unet": {
            **UNET,
            "sample_size": 128,
            "cross_attention_dim": 2048,
            "block_out_channels": [320, 640, 1280],
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
            "transformer_layers_per_block": [1, 2, 10],
            "attention_head_dim": [5, 10, 20],
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
            "use_linear_projection": True,
        },
        "vae": vae_of(4),
        "scheduler": EPSILON,
    },
    {**CLIPS, **pooled_of(clip_g_pooled=1280), "size_ids": ((6,), torch.float32)},
)
SD3 = FullSize(
    "Stable Diffusion 3.5 Large",
    "sd3",
    {
        "transformer": {
            "_class_name": "SD3Transformer2DModel",
            "num_layers": 38,
            "num_attention_heads": 38,
            "attention_head_dim": 64,
            "caption_projection_dim": 2432,
            "joint_attention_dim": 4096,
            "pooled_projection_dim": 2048,
            "pos_embed_max_size": 192,
            "qk_norm": "rms_norm",
        },
        "vae": VAE16,
    },
    {**CLIPS, **pooled_of(clip_l_pooled=768, clip_g_pooled=1280), **text_of("t5", 256, 4096, mask=False)},
)
FLUX = FullSize(
    "Flux.1 dev",
    "flux",
    {"transformer": {"_class_name": "FluxTransformer2DModel", "guidance_embeds": True}, "vae": VAE16},
    {**text_of("t5", 512, 4096, mask=False), **pooled_of(clip_pooled=768)},
)
FLUX2 = FullSize(
    "Flux.2 dev",
    "flux2",
    {"transformer": {"_class_name": "Flux2Transformer2DModel"}, "vae": FLUX2_VAE},
    text_of("mistral3", 512, 15360, mask=False),
)
FLUX2_KLEIN = FullSize(
    "Flux.2 Klein 4B",
    "flux2",
    {
        "transformer": {
            "_class_name": "Flux2Transformer2DModel",
            "num_layers": 5,
            "num_single_layers": 20,
            "num_attention_heads": 24,
            "joint_attention_dim": 7680,
            "guidance_embeds": False,
        },
        "vae": FLUX2_VAE,
    },
    text_of("qwen3", 512, 7680, mask=False),
)
CHROMA = FullSize(
    "Chroma",
    "chroma",
    {"transformer": {"_class_name": "ChromaTransformer2DModel"}, "vae": VAE16},
    text_of("t5", 512, 4096),
)
AURAFLOW = FullSize(
    "AuraFlow 0.3",
    "auraflow",
    {"transformer": {"_class_name": "AuraFlowTransformer2DModel", "pos_embed_max_size": 9216}, "vae": vae_of(4)},
    text_of("umt5", 256, 2048, mask=False),
)
LUMINA2 = FullSize(
    "Lumina 2",
    "lumina2",
    {"transformer": {"_class_name": "Lumina2Transformer2DModel", "cap_feat_dim": 2304}, "vae": VAE16},
    text_of("gemma2", 256, 2304),
)
COGVIEW4 = FullSize(
    "CogView4 6B",
    "cogview4",
    {
        "transformer": {
            "_class_name": "CogView4Transformer2DModel",
            "num_layers": 28,
            "num_attention_heads": 32,
            "attention_head_dim": 128,
            "text_embed_dim": 4096,
            "rope_axes_dim": [256, 256],
        },
        "vae": VAE16,
        "scheduler": {"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True},
    },
    text_of("glm", 256, 4096),
)
ERNIE_IMAGE = FullSize(
    "ERNIE-Image",
    "ernie_image",
    {
        "transformer": {
            "_class_name": "ErnieImageTransformer2DModel",
            "hidden_size": 4096,
            "num_attention_heads": 32,
            "num_layers": 36,
            "ffn_hidden_size": 12288,
            "text_in_dim": 3072,
        },
        "vae": FLUX2_VAE,
    },
    text_of("mistral3", 256, 3072),
)
HUNYUAN_DIT = FullSize(
    "HunyuanDiT 1.2",
    "hunyuan_dit",
    {
        "transformer": {
            "_class_name": "HunyuanDiT2DModel",
            "activation_fn": "gelu-approximate",
            "num_layers": 40,
            "num_attention_heads": 16,
            "attention_head_dim": 88,
            "hidden_size": 1408,
            "in_channels": 4,
            "patch_size": 2,
            "mlp_ratio": 4.3637,
            "sample_size": 128,
            "use_style_cond_and_image_meta_size": False,
        },
        "vae": vae_of(4),
        "scheduler": V_PREDICTION,
    },
    {**text_of("bert", 77, 1024), **text_of("mt5", 256, 2048)},
)
HUNYUAN_IMAGE = FullSize(
    "HunyuanImage 2.1",
    "hunyuan_image",
    {
        "transformer": {"_class_name": "HunyuanImageTransformer2DModel", "text_embed_2_dim": 1472},
        "vae": {
            "_class_name": "AutoencoderKLHunyuanImage",
            "latent_channels": 64,
            "block_out_channels": [128, 256, 512, 512, 1024, 1024],
            "scaling_factor": 0.75289,
        },
    },
    {**text_of("qwen2_5_vl", 1000, 3584), **text_of("byt5", 128, 1472)},
    (2048, 2048, 1),
)
Z_IMAGE = FullSize(
    "Z-Image",
    "z_image",
    {"transformer": {"_class_name": "ZImageTransformer2DModel"}, "vae": VAE16},
    text_of("qwen3", 512, 2560),
)
QWEN_IMAGE = FullSize(
    "Qwen-Image",
    "qwen_image",
    {
        "transformer": {"_class_name": "QwenImageTransformer2DModel"},
        "vae": video_vae_of("AutoencoderKLQwenImage"),
    },
    text_of("qwen2_5_vl", 512, 3584),
)
HIDREAM = FullSize(
    "HiDream-I1",
    "hidream",
    {
        "transformer": {
            "_class_name": "HiDreamImageTransformer2DModel",
            "attention_head_dim": 128,
            "num_attention_heads": 20,
            "num_layers": 16,
            "num_single_layers": 32,
            "num_routed_experts": 4,
            "num_activated_experts": 2,
            "caption_channels": [4096, 4096],
            "text_emb_dim": 2048,
            "in_channels": 16,
            "out_channels": 16,
            "patch_size": 2,
            "axes_dims_rope": [64, 32, 32],
            "max_resolution": [128, 128],
            "llama_layers": [*range(32), *[31] * 16],
        },
        "vae": VAE16,
    },
    {
        **pooled_of(clip_l_pooled=768, clip_g_pooled=1280),
        **text_of("t5", 128, 4096, mask=False),
        "llama3": ((32, 128, 4096), torch.bfloat16),
    },
)
ALL = (
    SD15,
    SDXL,
    SD3,
    FLUX,
    FLUX2,
    FLUX2_KLEIN,
    FLUX3,
    CHROMA,
    AURAFLOW,
    LUMINA2,
    COGVIEW4,
    ERNIE_IMAGE,
    HUNYUAN_DIT,
    Z_IMAGE,
    QWEN_IMAGE,
    QWEN_IMAGE_21,
    HIDREAM,
    SANA,
    WAN_SMALL,
    WAN,
    LTX_VIDEO,
    LTX_VIDEO_13B,
    HUNYUAN_VIDEO,
    HUNYUAN_VIDEO_15,
    COSMOS_1,
    COSMOS_PREDICT2,
    COSMOS_PREDICT2_14B,
    COSMOS_PREDICT25,
    HUNYUAN_IMAGE,
)


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
    "Qwen3-VL 4B: Flux.3": (
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
            "vision_config": {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "out_hidden_size": 2560},
        },
    ),
    "Qwen3-VL 8B: Qwen-Image 2.1": (
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
            "vision_config": {"out_hidden_size": 4096},
        },
    ),
    "Gemma 2 2B: Lumina 2, Sana": ("Gemma2Model", {}),
    "GLM-4 9B: CogView4": ("GlmModel", {}),
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
