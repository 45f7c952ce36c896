"""Models of clips at the sizes that people train."""

from __future__ import annotations

import torch

from tests.models.sized import FullSize, pooled_of, text_of, video_vae_of

WAN_VAE = video_vae_of("AutoencoderKLWan", scale_factor_temporal=4, scale_factor_spatial=8)
WAN_TEXT = text_of("umt5", 512, 4096)
WAN_SMALL = FullSize(
    "Wan 2.1 1.3B",
    "wan",
    {
        "transformer": {
            "_class_name": "WanTransformer3DModel",
            "in_channels": 16,
            "num_layers": 30,
            "num_attention_heads": 12,
            "ffn_dim": 8960,
        },
        "vae": WAN_VAE,
    },
    WAN_TEXT,
    (832, 480, 81),
)
WAN = FullSize(
    "Wan 14B",
    "wan",
    {"transformer": {"_class_name": "WanTransformer3DModel", "in_channels": 16}, "vae": WAN_VAE},
    WAN_TEXT,
    (832, 480, 49),
)
WAN_VACE = FullSize(
    "Wan VACE 1.3B",
    "wan_vace",
    {
        "transformer": {
            "_class_name": "WanVACETransformer3DModel",
            "num_layers": 30,
            "num_attention_heads": 12,
            "ffn_dim": 8960,
            "vace_layers": [*range(0, 30, 2)],
        },
        "vae": WAN_VAE,
    },
    {**WAN_TEXT, "guide_latents": ((32, 21, 60, 104), torch.bfloat16)},
    (832, 480, 81),
)
LTX_VAE = {
    "_class_name": "AutoencoderKLLTXVideo",
    "spatial_compression_ratio": 32,
    "temporal_compression_ratio": 8,
}
LTX_VIDEO = FullSize(
    "LTX-Video 2B",
    "ltx_video",
    {"transformer": {"_class_name": "LTXVideoTransformer3DModel"}, "vae": LTX_VAE},
    text_of("t5", 128, 4096),
    (704, 480, 97),
)
LTX_VIDEO_13B = FullSize(
    "LTX-Video 13B",
    "ltx_video",
    {
        "transformer": {
            "_class_name": "LTXVideoTransformer3DModel",
            "num_layers": 48,
            "attention_head_dim": 128,
            "cross_attention_dim": 4096,
        },
        "vae": LTX_VAE,
    },
    text_of("t5", 128, 4096),
    (704, 480, 97),
)
LTX2 = FullSize(
    "LTX-2",
    "ltx2",
    {
        "transformer": {"_class_name": "LTX2VideoTransformer3DModel", "rope_type": "split"},
        "vae": {**LTX_VAE, "_class_name": "AutoencoderKLLTX2Video"},
    },
    text_of("gemma3", 1024, 3840, mask=False),
    (704, 480, 97),
)
HUNYUAN_VIDEO = FullSize(
    "HunyuanVideo",
    "hunyuan_video",
    {
        "transformer": {"_class_name": "HunyuanVideoTransformer3DModel"},
        "vae": {"_class_name": "AutoencoderKLHunyuanVideo"},
    },
    {**text_of("llama", 256, 4096), **pooled_of(clip_pooled=768)},
    (832, 480, 49),
)
FRAMEPACK = FullSize(
    "FramePack",
    "framepack",
    {
        "transformer": {
            "_class_name": "HunyuanVideoFramepackTransformer3DModel",
            "has_image_proj": True,
            "has_clean_x_embedder": True,
        },
        "vae": {"_class_name": "AutoencoderKLHunyuanVideo"},
    },
    {
        **text_of("llama", 256, 4096),
        **pooled_of(clip_pooled=768),
        "first_frame_latents": ((16, 1, 60, 104), torch.bfloat16),
        "siglip_vision": ((729, 1152), torch.bfloat16),
    },
    (832, 480, 73),
)
HUNYUAN_VIDEO_15 = FullSize(
    "HunyuanVideo 1.5",
    "hunyuan_video_15",
    {
        "transformer": {"_class_name": "HunyuanVideo15Transformer3DModel"},
        "vae": {"_class_name": "AutoencoderKLHunyuanVideo15"},
    },
    {**text_of("qwen2_5_vl", 1000, 3584), **text_of("byt5", 256, 1472)},
    (832, 480, 49),
)
KANDINSKY5_TEXT = {**text_of("qwen2_5_vl", 512, 3584), **pooled_of(clip_pooled=768)}
MINIMAX_H3 = FullSize(
    "MiniMax-H3",
    "minimax_h3",
    {
        "transformer": {"_class_name": "MiniMaxH3Transformer3DModel"},
        "vae": {"_class_name": "AutoencoderKLMiniMaxH3"},
    },
    text_of("qwen3_vl", 512, 5120),
    (832, 480, 56),
)
COSMOS = {"_class_name": "CosmosTransformer3DModel", "extra_pos_embed_type": None}
COSMOS_PREDICT2 = FullSize(
    "Cosmos-Predict2 2B, text to image",
    "cosmos_predict2",
    {"transformer": {**COSMOS, "num_attention_heads": 16}, "vae": WAN_VAE},
    text_of("t5", 512, 1024),
)
COSMOS_PREDICT2_14B = FullSize(
    "Cosmos-Predict2 14B, video to world",
    "cosmos_predict2",
    {"transformer": {**COSMOS, "in_channels": 17, "num_attention_heads": 40, "num_layers": 36}, "vae": WAN_VAE},
    {**text_of("t5", 512, 1024), "first_frame_latents": ((16, 1, 60, 104), torch.bfloat16)},
    (832, 480, 49),
)
COSMOS_1 = FullSize(
    "Cosmos 1.0 7B, text to world",
    "cosmos",
    {
        "transformer": {"_class_name": "CosmosTransformer3DModel"},
        "vae": {
            "_class_name": "AutoencoderKLCosmos",
            "latent_channels": 16,
            "spatial_compression_ratio": 8,
            "temporal_compression_ratio": 8,
        },
    },
    text_of("t5", 512, 1024),
    (832, 480, 49),
)
COSMOS_PREDICT25 = FullSize(
    "Cosmos-Predict2.5 2B",
    "cosmos_predict25",
    {
        "transformer": {
            **COSMOS,
            "in_channels": 17,
            "num_attention_heads": 16,
            "use_crossattn_projection": True,
            "crossattn_proj_in_channels": 100352,
        },
        "vae": WAN_VAE,
    },
    {"qwen2_5_vl": ((512, 100352), torch.bfloat16)},
    (832, 480, 49),
)
KANDINSKY5 = FullSize(
    "Kandinsky 5 Lite, text to video",
    "kandinsky5",
    {
        "transformer": {
            "_class_name": "Kandinsky5Transformer3DModel",
            "in_visual_dim": 16,
            "out_visual_dim": 16,
            "model_dim": 1792,
            "ff_dim": 7168,
            "visual_cond": True,
        },
        "vae": {"_class_name": "AutoencoderKLHunyuanVideo"},
    },
    KANDINSKY5_TEXT,
    (832, 480, 49),
)
COGVIDEOX = FullSize(
    "CogVideoX 1.5 5B, text to video",
    "cogvideox",
    {
        "transformer": {
            "_class_name": "CogVideoXTransformer3DModel",
            "num_layers": 42,
            "num_attention_heads": 48,
            "patch_size_t": 2,
            "patch_bias": False,
            "sample_width": 300,
            "sample_height": 300,
            "sample_frames": 81,
            "use_rotary_positional_embeddings": True,
        },
        "vae": {"_class_name": "AutoencoderKLCogVideoX", "scaling_factor": 0.7},
        "scheduler": {
            "_class_name": "CogVideoXDPMScheduler",
            "snr_shift_scale": 1.0,
            "rescale_betas_zero_snr": True,
            "prediction_type": "v_prediction",
        },
    },
    text_of("t5", 226, 4096, mask=False),
    (832, 480, 49),
)
MOCHI = FullSize(
    "Mochi 1",
    "mochi",
    {
        "transformer": {"_class_name": "MochiTransformer3DModel"},
        "vae": {"_class_name": "AutoencoderKLMochi"},
    },
    text_of("t5", 256, 4096),
    (848, 480, 49),
)
