"""Denoisers at the sizes that people train, as pipelines without files of weights.

Shapes: a feature by name, without the batch.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
import transformers

import models
from models.base import BasePipeline
from utils.dataset.samples import Bucket
from utils.quantised.formats import FORMATS
from utils.quantised.linear import quantise

Shapes = Mapping[str, tuple[tuple[int, ...], torch.dtype]]


@dataclass(frozen=True)
class FullSize:
    """A model in a size that people train.

    Attributes:
        configs: folder of a part -> its configuration, where it differs from the class's defaults.
        size: width, height, frames.
    """

    name: str
    type: str
    configs: Mapping[str, Mapping[str, Any]]
    features: Shapes
    size: tuple[int, int, int] = (1024, 1024, 1)

    def pipeline(self, folder: Path, kind: type | None = None, **keys: Any) -> BasePipeline:
        """The model's pipeline, or one of the class `kind`, with further keys of [model]."""
        for part, config in self.configs.items():
            (folder / part).mkdir(parents=True, exist_ok=True)
            name = "scheduler_config.json" if part == "scheduler" else "config.json"
            (folder / part / name).write_text(json.dumps({**_defaults(config["_class_name"]), **config}))
        kind = kind or models.find(self.type)
        return kind(kind.Options(**{"type": self.type, "diffusers_path": folder, "dtype": "bfloat16", **keys}), 0)

    @property
    def encoders(self) -> Sequence[Any]:
        """What the plan asks encoders for."""
        return [SimpleNamespace(feature_shapes=lambda bucket: self.features)]

    @property
    def bucket(self) -> Bucket:
        return Bucket(*self.size)


def _defaults(name: str) -> dict[str, Any]:
    """Those of a class of diffusers."""
    parameters = inspect.signature(getattr(diffusers, name).__init__).parameters.values()
    return {one.name: one.default for one in parameters if one.default is not inspect.Parameter.empty}


def _text(name: str, tokens: int, width: int, *, mask: bool = True) -> Shapes:
    feature = {name: ((tokens, width), torch.bfloat16)}
    return {**feature, f"{name}_mask": ((tokens,), torch.bool)} if mask else feature


def _pooled(**widths: int) -> Shapes:
    return {name: ((width,), torch.bfloat16) for name, width in widths.items()}


def _vae(channels: int, **more: Any) -> dict[str, Any]:
    blocks = {"block_out_channels": [128, 256, 512, 512], "down_block_types": ["DownEncoderBlock2D"] * 4}
    return {"_class_name": "AutoencoderKL", "latent_channels": channels, "scaling_factor": 0.5, **blocks, **more}


def _video_vae(kind: str, **more: Any) -> dict[str, Any]:
    return {"_class_name": kind, "z_dim": 16, "latents_mean": [0.0] * 16, "latents_std": [1.0] * 16, **more}


VAE16 = _vae(16, shift_factor=0.1)
WAN_VAE = _video_vae("AutoencoderKLWan", scale_factor_temporal=4, scale_factor_spatial=8)
WAN_TEXT = _text("umt5", 512, 4096)
CLIPS = {"clip_l": ((77, 768), torch.bfloat16), "clip_g": ((77, 1280), torch.bfloat16)}
UNET = {"_class_name": "UNet2DConditionModel", "sample_size": 64}
EPSILON = {"_class_name": "EulerDiscreteScheduler", "beta_schedule": "scaled_linear", "prediction_type": "epsilon"}
V_PREDICTION = {"_class_name": "DDPMScheduler", "beta_schedule": "scaled_linear", "prediction_type": "v_prediction"}

SD15 = FullSize(
    "Stable Diffusion 1.5",
    "sd15",
    {
        "unet": {**UNET, "cross_attention_dim": 768, "attention_head_dim": 8},
        "vae": _vae(4),
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
        "vae": _vae(4),
        "scheduler": EPSILON,
    },
    {**CLIPS, **_pooled(clip_g_pooled=1280), "size_ids": ((6,), torch.float32)},
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
    {**CLIPS, **_pooled(clip_l_pooled=768, clip_g_pooled=1280), **_text("t5", 256, 4096, mask=False)},
)
FLUX = FullSize(
    "Flux.1 dev",
    "flux",
    {"transformer": {"_class_name": "FluxTransformer2DModel", "guidance_embeds": True}, "vae": VAE16},
    {**_text("t5", 512, 4096, mask=False), **_pooled(clip_pooled=768)},
)
CHROMA = FullSize(
    "Chroma",
    "chroma",
    {"transformer": {"_class_name": "ChromaTransformer2DModel"}, "vae": VAE16},
    _text("t5", 512, 4096),
)
AURAFLOW = FullSize(
    "AuraFlow 0.3",
    "auraflow",
    {"transformer": {"_class_name": "AuraFlowTransformer2DModel", "pos_embed_max_size": 9216}, "vae": _vae(4)},
    _text("umt5", 256, 2048, mask=False),
)
LUMINA2 = FullSize(
    "Lumina 2",
    "lumina2",
    {"transformer": {"_class_name": "Lumina2Transformer2DModel", "cap_feat_dim": 2304}, "vae": VAE16},
    _text("gemma2", 256, 2304),
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
    _text("glm", 256, 4096),
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
        "vae": _vae(4),
        "scheduler": V_PREDICTION,
    },
    {**_text("bert", 77, 1024), **_text("mt5", 256, 2048)},
)
Z_IMAGE = FullSize(
    "Z-Image",
    "z_image",
    {"transformer": {"_class_name": "ZImageTransformer2DModel"}, "vae": VAE16},
    _text("qwen3", 512, 2560),
)
QWEN_IMAGE = FullSize(
    "Qwen-Image",
    "qwen_image",
    {
        "transformer": {"_class_name": "QwenImageTransformer2DModel"},
        "vae": _video_vae("AutoencoderKLQwenImage"),
    },
    _text("qwen2_5_vl", 512, 3584),
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
        **_pooled(clip_l_pooled=768, clip_g_pooled=1280),
        **_text("t5", 128, 4096, mask=False),
        "llama3": ((32, 128, 4096), torch.bfloat16),
    },
)
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
HUNYUAN_VIDEO = FullSize(
    "HunyuanVideo",
    "hunyuan_video",
    {
        "transformer": {"_class_name": "HunyuanVideoTransformer3DModel"},
        "vae": {"_class_name": "AutoencoderKLHunyuanVideo"},
    },
    {**_text("llama", 256, 4096), **_pooled(clip_pooled=768)},
    (832, 480, 49),
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
    {**_text("qwen2_5_vl", 1000, 3584), **_text("byt5", 128, 1472)},
    (2048, 2048, 1),
)

ALL = (
    SD15,
    SDXL,
    SD3,
    FLUX,
    CHROMA,
    LUMINA2,
    COGVIEW4,
    HUNYUAN_DIT,
    Z_IMAGE,
    QWEN_IMAGE,
    HIDREAM,
    WAN_SMALL,
    WAN,
    HUNYUAN_VIDEO,
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
    "T5-XXL: Stable Diffusion 3.5, Flux, Chroma, HiDream": ("T5EncoderModel", {**_T5_XXL, "vocab_size": 32128}),
    "UMT5-XXL: Wan": ("UMT5EncoderModel", {**_T5_XXL, "vocab_size": 256384}),
    "mT5-XL: HunyuanDiT": (
        "T5EncoderModel",
        {**_T5_XXL, "vocab_size": 250112, "d_model": 2048, "d_ff": 5120, "num_heads": 32},
    ),
    "Llama 3 8B: HiDream, HunyuanVideo": (
        "LlamaModel",
        {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_key_value_heads": 8},
    ),
    "Qwen2.5-VL 7B: Qwen-Image, HunyuanImage": (
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
