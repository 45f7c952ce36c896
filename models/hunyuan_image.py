"""HunyuanImage 2.1: blocks with two streams, then blocks in which picture and text are one sequence.

Shapes: B batch, C latent channels, h w latent cells, each of which is an image token, T of them, L text tokens, first
those of quoted texts, S = T + L, D width of the transformer.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from einops import rearrange
from torch import nn

from models.base import Features, ModelEncoder
from models.families.pictures import PicturePipeline
from models.foundation.checkpoints.folders import TextPart
from models.foundation.checkpoints.layouts.hunyuan_image import HUNYUAN_IMAGE_LAYOUT
from models.foundation.encoders.hunyuan_prompts import GlyphFeatures, image_prompt
from models.foundation.encoders.hunyuan_vae import HUNYUAN_IMAGE, HunyuanImageAutoencoder
from models.foundation.encoders.text import TextEncoder
from models.foundation.layers.chain import Middle
from models.foundation.layers.padding import mask_behind, seen_first
from models.foundation.layers.patches import blank_latent
from utils.dataset.buckets import MediaFacts
from utils.diffusion.objectives import FlowMatching
from utils.errors import Problem
from utils.settings.model_schema import ModelSettings
from utils.settings.values import Count

if TYPE_CHECKING:
    from diffusers import HunyuanImageTransformer2DModel

TEXT, GLYPHS = "qwen2_5_vl", "byt5"
GLYPH_TOKENS = 128


class HunyuanImageOptions(ModelSettings):
    """`[model]` of `type = "hunyuan_image"`."""

    max_sequence_length: Count = 1000
    """Number of Qwen2.5-VL tokens of a caption that are read."""


class HunyuanImageInputs(NamedTuple):
    """The inputs of the entry. Without a mask, no text is padded. `order_BL` has the places, among glyphs and text one
    after the other, of the tokens in the order in which the model sees them."""

    x_BChw: torch.Tensor
    text_BLD: torch.Tensor
    text_mask_BL: torch.Tensor | None
    glyphs_BLD: torch.Tensor
    order_BL: torch.Tensor
    both_mask_BL: torch.Tensor | None
    t_B: torch.Tensor


class HunyuanImageStream(NamedTuple):
    """What travels from layer to layer. `canvas_hw0` has no elements: its shape carries the latent's height and
    width."""

    x_BTD: torch.Tensor
    text_BLD: torch.Tensor
    mask_B11S: torch.Tensor | None
    time_BD: torch.Tensor
    rope_TD: tuple[torch.Tensor, torch.Tensor]
    canvas_hw0: torch.Tensor


class Entry(nn.Module):
    """Embeds the latent, time and positions, refines the text, and puts the quoted texts before it. Each stage makes
    the rotary tables itself."""

    remakes = ("rope_TD",)

    def __init__(self, denoiser: HunyuanImageTransformer2DModel):
        super().__init__()
        self.rope = denoiser.rope
        self.x_embedder = denoiser.x_embedder
        self.context_embedder = denoiser.context_embedder
        self.context_embedder_2 = denoiser.context_embedder_2
        self.time_guidance_embed = denoiser.time_guidance_embed

    def forward(self, inputs: HunyuanImageInputs) -> HunyuanImageStream:
        dtype = self.x_embedder.proj.weight.dtype
        x_BChw = inputs.x_BChw.to(dtype)
        x_BTD, mask_BL = self.x_embedder(x_BChw), inputs.both_mask_BL
        text_BLD = self.context_embedder(inputs.text_BLD.to(dtype), inputs.t_B, inputs.text_mask_BL)
        both_BLD = torch.cat([self.context_embedder_2(inputs.glyphs_BLD.to(dtype)), text_BLD], dim=1)
        # Its own forward would embed the time in the type in which it is told, which is float32.
        embed = self.time_guidance_embed
        return HunyuanImageStream(
            x_BTD=x_BTD,
            text_BLD=torch.take_along_dim(both_BLD, inputs.order_BL.unsqueeze(2), dim=1),
            mask_B11S=None if mask_BL is None else mask_behind(mask_BL, x_BTD.shape[1]),
            time_BD=embed.timestep_embedder(embed.time_proj(inputs.t_B).to(dtype)),
            rope_TD=self.rope(x_BChw),
            canvas_hw0=torch.empty(*x_BChw.shape[2:], 0, device=x_BTD.device),
        )

    def remake(self, stream: HunyuanImageStream) -> dict[str, Any]:
        """The fields that are not sent from stage to stage."""
        return {"rope_TD": self.rope(blank_latent(stream.canvas_hw0, (1, 1)))}


class Exit(nn.Module):
    """Projects the image tokens to the latent (B, C, h, w)."""

    def __init__(self, denoiser: HunyuanImageTransformer2DModel):
        super().__init__()
        self.norm_out = denoiser.norm_out
        self.proj_out = denoiser.proj_out

    def forward(self, stream: HunyuanImageStream) -> torch.Tensor:
        height, width, _ = stream.canvas_hw0.shape
        x_BTC = self.proj_out(self.norm_out(stream.x_BTD, stream.time_BD))
        return rearrange(x_BTC, "b (h w) c -> b c h w", h=height, w=width).contiguous()


class HunyuanImagePipeline(PicturePipeline):
    """HunyuanImage 2.1 of Tencent. Texts in quotation marks are read by ByT5 too. Samples are guided plainly in all
    steps; in inference another law (adaptive projected guidance) follows from the seventh step on."""

    Options = HunyuanImageOptions
    spec_architecture = "hunyuan-image-2.1"
    denoiser_class = "HunyuanImageTransformer2DModel"
    config_keys = ("in_channels", "text_embed_2_dim", "text_embed_dim")
    text_parts = (
        TextPart(TEXT, "Qwen2_5_VLModel"),
        TextPart(GLYPHS, "T5EncoderModel", "text_encoder_2", "tokenizer_2"),
    )
    media = MediaFacts(spatial=32, temporal=1, max_frames=1)
    patch = 1
    objective = FlowMatching(time_scale=1000.0)
    blocks = ("transformer_blocks", "single_transformer_blocks")
    stream_type = HunyuanImageStream
    original_layout = HUNYUAN_IMAGE_LAYOUT
    guided_by_second_prediction = True

    def problems_of_parts(self) -> Iterator[Problem]:
        config, made = self.parts.denoiser_config, self.vae_config["latent_channels"]
        if config.get("guidance_embeds") or config.get("use_meanflow"):
            yield self.parts.misfit(
                "is the distilled model, which learns steps of its own and is not trained here; give HunyuanImage 2.1 "
                "itself"
            )
        if list(config.get("patch_size", (1, 1))) != [1, 1]:
            yield self.parts.misfit("is the refiner, which is not trained here; give HunyuanImage 2.1 itself")
        elif config["in_channels"] != made:
            yield self.parts.misfit(
                f"takes latents of {config['in_channels']} channels and the VAE makes {made}; give HunyuanImage's own"
            )
        for encoder, key, what in zip(
            self._text_encoders(), ("text_embed_dim", "text_embed_2_dim"), ("Qwen2.5-VL 7B", "Glyph-ByT5"), strict=True
        ):
            _, width = encoder.shapes[encoder.features.name]
            if config[key] != width:
                yield self.parts.misfit(f"has `{key}` {config[key]}, and its text encoder makes {width}; give {what}")

    def autoencoder(self) -> HunyuanImageAutoencoder:
        options = self.options
        return HunyuanImageAutoencoder(options.diffusers_path, options.vae_path, self.dtype, draw=options.latents)

    def _text_encoders(self) -> list[TextEncoder]:
        kinds = (image_prompt(TEXT, self.options.max_sequence_length), GlyphFeatures(GLYPHS, GLYPH_TOKENS))
        return [self.parts.text_encoder(features) for features in kinds]

    def encoders(self, controls: int = 0) -> list[ModelEncoder]:
        return [self.autoencoder(), *self._text_encoders()]

    def to_layers(self, denoiser: HunyuanImageTransformer2DModel) -> list[nn.Module]:
        reads = {
            "hidden_states": "x_BTD",
            "encoder_hidden_states": "text_BLD",
            "temb": "time_BD",
            "attention_mask": "mask_B11S",
            "image_rotary_emb": "rope_TD",
        }
        blocks = [*denoiser.transformer_blocks, *denoiser.single_transformer_blocks]
        middles = [Middle(block, reads, writes=("x_BTD", "text_BLD")) for block in blocks]
        return [Entry(denoiser), *middles, Exit(denoiser)]

    def prepare_inputs(
        self, features: Features, x_t: torch.Tensor, t_B: torch.Tensor, guidance: float | None = None
    ) -> HunyuanImageInputs:
        text_mask_BL, glyph_mask_BL = (features[f"{name}_mask"].bool() for name in (TEXT, GLYPHS))
        # Those of quoted texts before the others.
        order_BL, both_mask_BL = seen_first(glyph_mask_BL, text_mask_BL)
        return HunyuanImageInputs(
            x_BChw=x_t,
            text_BLD=features[TEXT],
            # With a mask, even of ones, attention is slower.
            text_mask_BL=None if text_mask_BL.all() else text_mask_BL,
            glyphs_BLD=features[GLYPHS],
            order_BL=order_BL,
            both_mask_BL=both_mask_BL,
            t_B=self.objective.model_time(t_B),
        )

    # Kept, as every micro-batch asks for it.
    @cached_property
    def vae_config(self) -> dict[str, Any]:
        return HUNYUAN_IMAGE.config(self.options.diffusers_path, self.options.vae_path)
