"""AuraFlow: blocks with two streams, then blocks in which text and picture are one sequence; Pony v7 is one of them.

Shapes: B batch, T image tokens, L text tokens (with the model's own, which precede the caption), C latent channels,
D width, h w latent cells.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

from models.base import Features, ModelEncoder
from models.families.pictures import PicturePipeline
from models.foundation.checkpoints.folders import TextPart
from models.foundation.checkpoints.layouts.auraflow import AURAFLOW_LAYOUT
from models.foundation.encoders.text_features import TrueLengthFeatures
from models.foundation.layers.chain import Middle
from models.foundation.layers.joining import JoinedMiddle, picture_of
from models.foundation.layers.padding import lengthened
from models.foundation.layers.patches import unpatchify
from utils.errors import Problem
from utils.settings.model_schema import ModelSettings
from utils.settings.values import Count

if TYPE_CHECKING:
    from diffusers import AuraFlowTransformer2DModel


class AuraFlowOptions(ModelSettings):
    """`[model]` of `type = "auraflow"`."""

    max_sequence_length: Count = 256
    """Number of Pile-T5 tokens that the model sees, including padding; 768 for Pony v7."""


class AuraFlowInputs(NamedTuple):
    """The inputs of the entry."""

    x_BChw: torch.Tensor
    text_BLD: torch.Tensor
    t_B: torch.Tensor


class AuraFlowStream(NamedTuple):
    """What travels from layer to layer; see `foundation/layers/joining.py` for the first two. `canvas_hw0` has no
    elements: its shape carries the latent's height and width."""

    x_BTD: torch.Tensor
    text_BLD: torch.Tensor
    time_BD: torch.Tensor
    canvas_hw0: torch.Tensor


class Entry(nn.Module):
    """Embeds patches with their positions, the text behind the model's own tokens, and the time."""

    def __init__(self, denoiser: AuraFlowTransformer2DModel):
        super().__init__()
        self.pos_embed = denoiser.pos_embed
        self.context_embedder = denoiser.context_embedder
        self.time_step_embed = denoiser.time_step_embed
        self.time_step_proj = denoiser.time_step_proj
        self.register_tokens = denoiser.register_tokens

    def forward(self, inputs: AuraFlowInputs) -> AuraFlowStream:
        dtype = self.context_embedder.weight.dtype
        text_BLD = self.context_embedder(inputs.text_BLD.to(dtype))
        registers_BRD = self.register_tokens.to(dtype).repeat(len(text_BLD), 1, 1)
        # The time stays float32 until it is embedded.
        time_BE = self.time_step_embed(inputs.t_B).to(dtype)
        return AuraFlowStream(
            x_BTD=self.pos_embed(inputs.x_BChw.to(dtype)),
            text_BLD=torch.cat([registers_BRD, text_BLD], dim=1),
            time_BD=self.time_step_proj(time_BE),
            canvas_hw0=text_BLD.new_empty(*inputs.x_BChw.shape[2:], 0),
        )


class Exit(nn.Module):
    """Projects the image tokens to the latent (B, C, h, w)."""

    def __init__(self, denoiser: AuraFlowTransformer2DModel):
        super().__init__()
        self.norm_out = denoiser.norm_out
        self.proj_out = denoiser.proj_out

    def forward(self, stream: AuraFlowStream) -> torch.Tensor:
        height, width, _ = stream.canvas_hw0.shape
        return unpatchify(self.proj_out(self.norm_out(picture_of(stream), stream.time_BD)), height, width)


class AuraFlowPipeline(PicturePipeline):
    """AuraFlow of fal, and Pony v7 of AstraliteHeart."""

    Options = AuraFlowOptions
    denoiser_class = "AuraFlowTransformer2DModel"
    config_keys = ("in_channels", "joint_attention_dim", "pos_embed_max_size")
    text_parts = (TextPart("umt5", "UMT5EncoderModel"),)
    scheduler_sets_levels = True
    blocks = ("joint_transformer_blocks", "single_transformer_blocks")
    stream_type = AuraFlowStream
    original_layout = AURAFLOW_LAYOUT
    guided_by_second_prediction = True

    def problems_of_parts(self) -> Iterator[Problem]:
        config, made = self.parts.denoiser_config, self.vae_config["latent_channels"]
        width, read = config["joint_attention_dim"], self.parts.text_config("umt5")["d_model"]
        if config["in_channels"] != made:
            yield self.parts.misfit(
                f"takes latents of {config['in_channels']} channels and the VAE makes {made}; give the VAE of SDXL"
            )
        if width != read:
            yield self.parts.misfit(f"takes text of {width} features and UMT5 makes {read}; give Pile-T5-XL")

    @property
    def places(self) -> tuple[int, int]:
        side = math.isqrt(self.parts.denoiser_config["pos_embed_max_size"])
        return side, side

    def encoders(self, controls: int = 0) -> list[ModelEncoder]:
        features = TrueLengthFeatures("umt5", self.options.max_sequence_length)
        return [self.autoencoder(), self.parts.text_encoder(features)]

    def to_layers(self, denoiser: AuraFlowTransformer2DModel) -> list[nn.Module]:
        of_picture = {"hidden_states": "x_BTD", "temb": "time_BD"}
        of_both = {**of_picture, "encoder_hidden_states": "text_BLD"}
        return [
            Entry(denoiser),
            *(Middle(block, of_both, writes=("text_BLD", "x_BTD")) for block in denoiser.joint_transformer_blocks),
            *(JoinedMiddle(block, of_picture, writes=("x_BTD",)) for block in denoiser.single_transformer_blocks),
            Exit(denoiser),
        ]

    def prepare_inputs(
        self, features: Features, x_t: torch.Tensor, t_B: torch.Tensor, guidance: float | None = None
    ) -> AuraFlowInputs:
        # The padding is seen, as zeros.
        return AuraFlowInputs(x_t, lengthened(features["umt5"], self.options.max_sequence_length), t_B)
