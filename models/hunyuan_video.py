"""HunyuanVideo: blocks with two streams, then blocks in which video and text are one sequence.

Models of text to video are trained on pictures and clips together.

Shapes: B batch, C latent channels, f h w latent frames, height and width, T video tokens, L text tokens, S = T + L,
D width of the transformer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from einops import rearrange
from torch import nn

from models.base import BasePipeline, Features, ModelEncoder
from models.foundation.checkpoints.configs import stock_scheduler
from models.foundation.checkpoints.folders import TextPart
from models.foundation.checkpoints.layouts.hunyuan_video import HUNYUAN_VIDEO_LAYOUT
from models.foundation.encoders.hunyuan_prompts import video_prompt
from models.foundation.encoders.hunyuan_vae import HUNYUAN_VIDEO, HunyuanVideoAutoencoder, hunyuan_latent_size
from models.foundation.encoders.text_features import ClipPooled
from models.foundation.layers.chain import Middle
from utils.dataset.buckets import MediaFacts
from utils.diffusion.objectives import FlowMatching
from utils.errors import Problem
from utils.settings.model_schema import ModelSettings
from utils.settings.values import Count

if TYPE_CHECKING:
    from diffusers import FlowMatchEulerDiscreteScheduler, HunyuanVideoTransformer3DModel

PATCH = 2
TRAIN_STEPS = 1000


class HunyuanVideoOptions(ModelSettings):
    """`[model]` of `type = "hunyuan_video"`."""

    guidance: float = 1.0
    """Guidance embedded in training (models with a guidance embedding only); 1 trains the plain conditional flow."""
    max_sequence_length: Count = 256
    """Number of Llama tokens of a caption that are read."""


class HunyuanVideoInputs(NamedTuple):
    """The inputs of the entry. Without a mask, no text is padded."""

    x_BCfhw: torch.Tensor
    text_BLD: torch.Tensor
    text_mask_BL: torch.Tensor | None
    pooled_BD: torch.Tensor
    t_B: torch.Tensor
    guidance_B: torch.Tensor | None


class HunyuanVideoStream(NamedTuple):
    """What travels from layer to layer. `canvas_fhw0` has no elements: its shape carries the tokens' grid."""

    x_BTD: torch.Tensor
    text_BLD: torch.Tensor
    mask_B11S: torch.Tensor | None
    time_BD: torch.Tensor
    rope_TD: tuple[torch.Tensor, torch.Tensor]
    canvas_fhw0: torch.Tensor


class Entry(nn.Module):
    """Embeds patches, time and positions, and refines the text."""

    def __init__(self, denoiser: HunyuanVideoTransformer3DModel):
        super().__init__()
        self.rope = denoiser.rope
        self.x_embedder = denoiser.x_embedder
        self.context_embedder = denoiser.context_embedder
        self.time_text_embed = denoiser.time_text_embed
        self.patch = (denoiser.config.patch_size_t, denoiser.config.patch_size, denoiser.config.patch_size)

    def forward(self, inputs: HunyuanVideoInputs) -> HunyuanVideoStream:
        dtype = self.x_embedder.proj.weight.dtype
        x_BCfhw, mask_BL = inputs.x_BCfhw.to(dtype), inputs.text_mask_BL
        x_BTD = self.x_embedder(x_BCfhw)
        # Time and guidance stay float32 until they are embedded: bfloat16 would round 0..1000 to steps of 4.
        time_BD, _ = self.time_text_embed(inputs.t_B, inputs.pooled_BD.to(dtype), inputs.guidance_B)
        grid = [side // patch for side, patch in zip(x_BCfhw.shape[2:], self.patch, strict=True)]
        return HunyuanVideoStream(
            x_BTD=x_BTD,
            text_BLD=self.context_embedder(inputs.text_BLD.to(dtype), inputs.t_B, mask_BL),
            mask_B11S=None if mask_BL is None else mask_of_both(mask_BL, x_BTD.shape[1]),
            time_BD=time_BD,
            rope_TD=self.rope(x_BCfhw),
            canvas_fhw0=torch.empty(*grid, 0, device=x_BTD.device),
        )


def mask_of_both(text_mask_BL: torch.Tensor, tokens: int) -> torch.Tensor:
    """The mask (B, 1, 1, S) of a sequence of `tokens` tokens of video, all of which are seen, and of the text behind
    them."""
    mask_BS = torch.cat([text_mask_BL.new_ones(len(text_mask_BL), tokens), text_mask_BL], dim=1)
    return rearrange(mask_BS, "b s -> b 1 1 s")


class Exit(nn.Module):
    """Projects the video tokens to the latent (B, C, f, h, w)."""

    def __init__(self, denoiser: HunyuanVideoTransformer3DModel):
        super().__init__()
        self.norm_out = denoiser.norm_out
        self.proj_out = denoiser.proj_out
        self.patch = (denoiser.config.patch_size_t, denoiser.config.patch_size, denoiser.config.patch_size)

    def forward(self, stream: HunyuanVideoStream) -> torch.Tensor:
        x_BTC = self.proj_out(self.norm_out(stream.x_BTD, stream.time_BD))
        frames, height, width, _ = stream.canvas_fhw0.shape
        return rearrange(
            x_BTC,
            "b (f h w) (c p q r) -> b c (f p) (h q) (w r)",
            **dict(zip("fhwpqr", (frames, height, width, *self.patch), strict=True)),
        )


class HunyuanVideoPipeline(BasePipeline):
    """HunyuanVideo of Tencent: text to video."""

    Options = HunyuanVideoOptions
    denoiser_class = "HunyuanVideoTransformer3DModel"
    config_keys = ("in_channels", "pooled_projection_dim", "text_embed_dim")
    text_parts = (
        TextPart("llama", "LlamaModel"),
        TextPart("clip", "CLIPTextModel", "text_encoder_2", "tokenizer_2"),
    )
    media = MediaFacts(spatial=16, temporal=4, max_frames=257, fps=24.0)
    objective = FlowMatching(time_scale=TRAIN_STEPS)
    blocks = ("transformer_blocks", "single_transformer_blocks")
    stream_type = HunyuanVideoStream
    original_layout = HUNYUAN_VIDEO_LAYOUT

    def problems_of_parts(self) -> Iterator[Problem]:
        config, made = self.parts.denoiser_config, self._vae_config["latent_channels"]
        if config.get("image_condition_type") is not None or config["in_channels"] == 2 * made + 1:
            yield self.parts.misfit(
                "is of picture to video, which is not trained here; give HunyuanVideo of text to video"
            )
        elif config["in_channels"] != made:
            yield self.parts.misfit(
                f"takes {config['in_channels']} channels, and the VAE makes {made}; give HunyuanVideo of text to "
                "video, with its own VAE"
            )
        for key, name, what in (
            ("text_embed_dim", "llama", "the Llama of LLaVA-Llama-3-8B"),
            ("pooled_projection_dim", "clip", "CLIP-L"),
        ):
            width = self.parts.text_config(name)["hidden_size"]
            if config[key] != width:
                yield self.parts.misfit(f"takes text of {config[key]} features and `{name}` makes {width}; give {what}")

    def encoders(self, controls: int = 0) -> list[ModelEncoder]:
        options = self.options
        return [
            HunyuanVideoAutoencoder(options.diffusers_path, options.vae_path, self.dtype, draw=options.latents),
            self.parts.text_encoder(video_prompt("llama", options.max_sequence_length)),
            self.parts.text_encoder(ClipPooled()),
        ]

    def to_layers(self, denoiser: HunyuanVideoTransformer3DModel) -> list[nn.Module]:
        reads = {
            "hidden_states": "x_BTD",
            "encoder_hidden_states": "text_BLD",
            "temb": "time_BD",
            "attention_mask": "mask_B11S",
        }
        lists = {"freqs_cis": denoiser.transformer_blocks, "image_rotary_emb": denoiser.single_transformer_blocks}
        middles = [
            Middle(block, {**reads, positions: "rope_TD"}, writes=("x_BTD", "text_BLD"))
            for positions, blocks in lists.items()
            for block in blocks
        ]
        return [Entry(denoiser), *middles, Exit(denoiser)]

    def prepare_inputs(
        self, features: Features, x_t: torch.Tensor, t_B: torch.Tensor, guidance: float | None = None
    ) -> HunyuanVideoInputs:
        mask_BL, embeds = features["llama_mask"].bool(), self.parts.denoiser_config.get("guidance_embeds", True)
        strength = self.options.guidance if guidance is None else guidance
        return HunyuanVideoInputs(
            x_BCfhw=x_t,
            text_BLD=features["llama"],
            # With a mask, even of ones, attention is slower.
            text_mask_BL=None if mask_BL.all() else mask_BL,
            pooled_BD=features["clip_pooled"],
            t_B=self.objective.model_time(t_B),
            guidance_B=torch.full((len(x_t),), strength * TRAIN_STEPS) if embeds else None,
        )

    def tokens(self, latent_shape: Sequence[int]) -> int:
        *_, height, width = latent_shape
        return (height // PATCH) * (width // PATCH)

    def latent_shape(self, width: int, height: int, frames: int = 1) -> tuple[int, ...]:
        return hunyuan_latent_size(self._vae_config, width, height, frames)

    def scheduler(self) -> FlowMatchEulerDiscreteScheduler:
        return stock_scheduler(self.options.diffusers_path, "FlowMatchEulerDiscreteScheduler")

    # Kept, as every micro-batch asks for it.
    @cached_property
    def _vae_config(self) -> dict[str, Any]:
        return HUNYUAN_VIDEO.config(self.options.diffusers_path, self.options.vae_path)
