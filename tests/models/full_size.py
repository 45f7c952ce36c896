"""Denoisers at the sizes that people train, as pipelines without files of weights.

Shapes: a feature by name, without the batch.
"""

from __future__ import annotations

import torch

from tests.models.full_size_clips import (
    COGVIDEOX,
    COSMOS_1,
    COSMOS_PREDICT2,
    COSMOS_PREDICT2_14B,
    COSMOS_PREDICT25,
    FRAMEPACK,
    HUNYUAN_VIDEO,
    HUNYUAN_VIDEO_15,
    KANDINSKY5,
    LTX2,
    LTX_VIDEO,
    LTX_VIDEO_13B,
    MINIMAX_H3,
    MOCHI,
    WAN,
    WAN_SMALL,
    WAN_VACE,
)
from tests.models.full_size_pictures import FLUX2_VAE, FLUX3, KANDINSKY5_IMAGE, PIXART, QWEN_IMAGE_21, SANA
from tests.models.sized import FullSize, pooled_of, text_of, vae_of, video_vae_of

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
OMNIGEN2 = FullSize(
    "OmniGen2",
    "omnigen2",
    {"transformer": {"_class_name": "OmniGen2Transformer2DModel"}, "vae": VAE16},
    text_of("qwen2_5_vl", 888, 2048),
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
KREA2 = FullSize(
    "Krea 2",
    "krea2",
    {
        "transformer": {"_class_name": "Krea2Transformer2DModel"},
        "vae": video_vae_of("AutoencoderKLQwenImage"),
    },
    text_of("qwen3_vl", 512, 12 * 2560),
)
IDEOGRAM4 = FullSize(
    "Ideogram 4",
    "ideogram4",
    {"transformer": {"_class_name": "Ideogram4Transformer2DModel"}, "vae": FLUX2_VAE},
    text_of("qwen3_vl", 512, 13 * 4096),
)
ANIMA = FullSize(
    "Anima",
    "anima",
    {
        "transformer": COSMOS_PREDICT2.configs["transformer"],
        "text_conditioner": {"_class_name": "AnimaTextConditioner"},
        "vae": video_vae_of("AutoencoderKLQwenImage"),
    },
    {**text_of("qwen3", 512, 1024), "t5_tokens": ((512,), torch.int64), "t5_tokens_mask": ((512,), torch.bool)},
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
    ANIMA,
    LUMINA2,
    OMNIGEN2,
    COGVIEW4,
    ERNIE_IMAGE,
    HUNYUAN_DIT,
    Z_IMAGE,
    QWEN_IMAGE,
    QWEN_IMAGE_21,
    KREA2,
    IDEOGRAM4,
    HIDREAM,
    PIXART,
    SANA,
    KANDINSKY5_IMAGE,
    WAN_SMALL,
    WAN,
    WAN_VACE,
    LTX_VIDEO,
    LTX_VIDEO_13B,
    LTX2,
    HUNYUAN_VIDEO,
    HUNYUAN_VIDEO_15,
    FRAMEPACK,
    KANDINSKY5,
    COGVIDEOX,
    MOCHI,
    MINIMAX_H3,
    COSMOS_1,
    COSMOS_PREDICT2,
    COSMOS_PREDICT2_14B,
    COSMOS_PREDICT25,
    HUNYUAN_IMAGE,
)
