"""Flux.1: dev, schnell, Flex.1 (the folder's configuration tells them apart) and Kontext (given control images).

Shapes: B batch, T image tokens, L text tokens, S = L + T, C latent channels, D width, h w latent cells.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from models.base import Features, ModelEncoder
from models.families.pictures import PicturePipeline
from models.foundation.checkpoints.folders import TextPart
from models.foundation.checkpoints.layouts.flux import BFL_LAYOUT
from models.foundation.encoders.text_features import ClipPooled, T5Features
from models.foundation.encoders.vae import ImageAutoencoder
from models.foundation.layers.chain import Middle
from models.foundation.layers.patches import PATCH, pack, unpack
from utils.settings.model_schema import ModelSettings
from utils.settings.values import Count

if TYPE_CHECKING:
    from diffusers import FluxTransformer2DModel


class FluxOptions(ModelSettings):
    """`[model]` of `type = "flux"`."""

    guidance: float = 1.0
    """Guidance embedded in training (models with a guidance embedding only); 1 trains the plain conditional flow."""
    max_sequence_length: Count = 512
    """Number of T5 tokens that the model sees, including padding: 512 for dev and Kontext, 256 for schnell."""
    bypass_guidance_embedding: bool = False
    """Leave the guidance embedding out of the model's conditioning, as Flex.1 is trained."""


class FluxInputs(NamedTuple):
    """The inputs of the entry. `canvas_hw0` has no elements: its shape carries the latent's height and width."""

    x_BTC: torch.Tensor
    text_BLD: torch.Tensor
    pooled_BD: torch.Tensor
    t_B: torch.Tensor
    guidance_B: torch.Tensor | None
    positions_S3: torch.Tensor
    canvas_hw0: torch.Tensor


class FluxStream(NamedTuple):
    """What travels from layer to layer."""

    x_BTD: torch.Tensor
    text_BLD: torch.Tensor
    time_BD: torch.Tensor
    positions_S3: torch.Tensor
    rope_SD: tuple[torch.Tensor, torch.Tensor]
    canvas_hw0: torch.Tensor


class Entry(nn.Module):
    """Embeds tokens, text, time and positions. Each stage makes the rotary tables itself."""

    remakes = ("rope_SD",)

    def __init__(self, denoiser: FluxTransformer2DModel, bypass_guidance: bool):
        super().__init__()
        self.x_embedder = denoiser.x_embedder
        self.context_embedder = denoiser.context_embedder
        self.time_text_embed = denoiser.time_text_embed
        self.pos_embed = denoiser.pos_embed
        self.bypass_guidance = bypass_guidance

    def forward(self, inputs: FluxInputs) -> FluxStream:
        weight = self.x_embedder.weight
        pooled_BD = inputs.pooled_BD.to(weight.dtype)
        return FluxStream(
            x_BTD=self.x_embedder(inputs.x_BTC.to(weight.dtype)),
            text_BLD=self.context_embedder(inputs.text_BLD.to(weight.dtype)),
            time_BD=self._time(inputs.t_B, inputs.guidance_B, pooled_BD),
            positions_S3=inputs.positions_S3,
            rope_SD=self.pos_embed(inputs.positions_S3),
            canvas_hw0=inputs.canvas_hw0,
        )

    def remake(self, stream: FluxStream) -> dict[str, Any]:
        """The fields that are not sent from stage to stage."""
        return {"rope_SD": self.pos_embed(stream.positions_S3)}

    def _time(self, t_B: torch.Tensor, guidance_B: torch.Tensor | None, pooled_BD: torch.Tensor) -> torch.Tensor:
        """The time embedding. t stays float32 until it is embedded: bfloat16 would round 0..1000 to steps of 4."""
        embed = self.time_text_embed
        if guidance_B is None:
            return embed(t_B * 1000, pooled_BD)
        if not self.bypass_guidance:
            return embed(t_B * 1000, guidance_B * 1000, pooled_BD)
        time_BD = embed.timestep_embedder(embed.time_proj(t_B * 1000).to(pooled_BD.dtype))
        return time_BD + embed.text_embedder(pooled_BD)


class Exit(nn.Module):
    """Projects the noisy tokens (a control image's follow them) to the latent (B, C, h, w)."""

    def __init__(self, denoiser: FluxTransformer2DModel):
        super().__init__()
        self.norm_out = denoiser.norm_out
        self.proj_out = denoiser.proj_out

    def forward(self, stream: FluxStream) -> torch.Tensor:
        x_BTC = self.proj_out(self.norm_out(stream.x_BTD, stream.time_BD))
        height, width, _ = stream.canvas_hw0.shape
        return unpack(x_BTC[:, : (height // PATCH) * (width // PATCH)], height, width)


class FluxPipeline(PicturePipeline):
    """Flux.1 of Black Forest Labs, and models of its shape."""

    Options = FluxOptions
    denoiser_class = "FluxTransformer2DModel"
    text_parts = (
        TextPart("clip", "CLIPTextModel"),
        TextPart("t5", "T5EncoderModel", "text_encoder_2", "tokenizer_2"),
    )
    blocks = ("transformer_blocks", "single_transformer_blocks")
    stream_type = FluxStream
    original_layout = BFL_LAYOUT
    max_controls = 1

    @property
    def spec_architecture(self) -> str:
        """Of two models: one is guided by an input, the other not at all."""
        return "flux-1-dev" if self.parts.denoiser_config.get("guidance_embeds") else "flux-1-schnell"

    def encoders(self, controls: int = 0) -> list[ModelEncoder]:
        options, folder = self.options, self.options.diffusers_path
        control_vae = ImageAutoencoder(folder, options.vae_path, self.dtype, reads="control", draw="mode")
        return [
            self.autoencoder(),
            self.parts.text_encoder(ClipPooled()),
            self.parts.text_encoder(T5Features(options.max_sequence_length)),
            *([control_vae] if controls else []),
        ]

    def to_layers(self, denoiser: FluxTransformer2DModel) -> list[nn.Module]:
        reads = {
            "hidden_states": "x_BTD",
            "encoder_hidden_states": "text_BLD",
            "temb": "time_BD",
            "image_rotary_emb": "rope_SD",
        }
        blocks = [*denoiser.transformer_blocks, *denoiser.single_transformer_blocks]
        middles = [Middle(block, reads, writes=("text_BLD", "x_BTD")) for block in blocks]
        return [Entry(denoiser, self.options.bypass_guidance_embedding), *middles, Exit(denoiser)]

    def prepare_inputs(
        self, features: Features, x_t: torch.Tensor, t_B: torch.Tensor, guidance: float | None = None
    ) -> FluxInputs:
        batch, _, height, width = x_t.shape
        text_BLD = features["t5"]
        tokens, positions = [pack(x_t)], [torch.zeros(text_BLD.shape[1], 3), grid_positions(height, width, image=0)]
        if "control_latents" in features:
            control = features["control_latents"].float()
            tokens.append(pack(control))
            positions.append(grid_positions(*control.shape[2:], image=1))
        strength = self.options.guidance if guidance is None else guidance
        return FluxInputs(
            x_BTC=torch.cat(tokens, dim=1),
            text_BLD=text_BLD,
            pooled_BD=features["clip_pooled"],
            t_B=t_B,
            guidance_B=torch.full((batch,), strength) if self.parts.denoiser_config.get("guidance_embeds") else None,
            positions_S3=torch.cat(positions),
            canvas_hw0=torch.empty(height, width, 0),
        )


def grid_positions(height: int, width: int, image: int) -> torch.Tensor:
    """(image, row, column) of every token (T, 3) of a latent of `height` x `width` cells; a control is image 1."""
    rows, columns = torch.meshgrid(torch.arange(height // PATCH), torch.arange(width // PATCH), indexing="ij")
    return torch.stack([torch.full_like(rows, image), rows, columns], dim=-1).reshape(-1, 3).float()
