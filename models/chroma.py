"""Chroma: Flux's blocks, one small network that makes the modulations of all of them, and masked text.

Shapes: B batch, T image tokens, L text tokens, M rows of modulation, C channels, D width of the transformer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from einops import repeat
from torch import nn

from models.base import Features, ModelEncoder
from models.flux import FluxPipeline, grid_positions, pack, unpack
from models.foundation.checkpoints.folders import TextPart
from models.foundation.checkpoints.layouts.chroma import CHROMA_LAYOUT
from models.foundation.encoders.text_features import TrueLengthFeatures
from models.foundation.layers.joining import joined, picture_of
from utils.settings.model_schema import ModelSettings
from utils.settings.values import Count

if TYPE_CHECKING:
    from diffusers import ChromaTransformer2DModel

DOUBLE_ROWS, SINGLE_ROWS, EXIT_ROWS = 6, 3, 2
"""Rows of modulation for each stream of a double block, for a single block, and for the exit."""


class ChromaOptions(ModelSettings):
    """`[model]` of `type = "chroma"`."""

    max_sequence_length: Count = 512
    """Number of T5 tokens of a caption that are read."""


class ChromaInputs(NamedTuple):
    """The inputs of the entry. `canvas_hw0` has no elements: its shape carries the latent's height and width."""

    x_BTC: torch.Tensor
    text_BLD: torch.Tensor
    text_mask_BL: torch.Tensor | None
    t_B: torch.Tensor
    positions_S3: torch.Tensor
    canvas_hw0: torch.Tensor


class ChromaStream(NamedTuple):
    """What travels from layer to layer; see `foundation/layers/joining.py` for the first two."""

    x_BTD: torch.Tensor
    text_BLD: torch.Tensor
    modulation_BMD: torch.Tensor
    positions_S3: torch.Tensor
    rope_SD: tuple[torch.Tensor, torch.Tensor]
    mask_BS: torch.Tensor | None
    canvas_hw0: torch.Tensor


class Entry(nn.Module):
    """Embeds tokens, text and positions, and makes the modulations of all blocks from the time. Each stage makes the
    rotary tables itself."""

    remakes = ("rope_SD",)

    def __init__(self, denoiser: ChromaTransformer2DModel):
        super().__init__()
        self.x_embedder = denoiser.x_embedder
        self.context_embedder = denoiser.context_embedder
        self.time_text_embed = denoiser.time_text_embed
        self.distilled_guidance_layer = denoiser.distilled_guidance_layer
        self.pos_embed = denoiser.pos_embed

    def forward(self, inputs: ChromaInputs) -> ChromaStream:
        dtype = self.x_embedder.weight.dtype
        # t stays float32 until it is embedded: bfloat16 would round 0..1000 to steps of 4.
        time_BME = self._of_time(inputs.t_B * 1000).to(dtype)
        mask_BS = inputs.text_mask_BL
        if mask_BS is not None:
            mask_BS = torch.cat([mask_BS, mask_BS.new_ones(inputs.x_BTC.shape[:2])], dim=1)
        return ChromaStream(
            x_BTD=self.x_embedder(inputs.x_BTC.to(dtype)),
            text_BLD=self.context_embedder(inputs.text_BLD.to(dtype)),
            modulation_BMD=self.distilled_guidance_layer(time_BME),
            positions_S3=inputs.positions_S3,
            rope_SD=self.pos_embed(inputs.positions_S3),
            mask_BS=mask_BS,
            canvas_hw0=inputs.canvas_hw0,
        )

    def remake(self, stream: ChromaStream) -> dict[str, Any]:
        """The fields that are not sent from stage to stage."""
        return {"rope_SD": self.pos_embed(stream.positions_S3)}

    def _of_time(self, t_B: torch.Tensor) -> torch.Tensor:
        """For each modulation the embedding of the time, of a guidance of 0, and of the modulation's number
        (B, M, E). The stock module makes the zeros on the CPU, and lets the host wait until they are copied."""
        embed = self.time_text_embed
        no_guidance_B = torch.zeros_like(t_B, dtype=torch.int64)
        of_sample_BE = torch.cat([embed.time_proj(t_B), embed.guidance_proj(no_guidance_B)], dim=1)
        number_ME = embed.mod_proj.to(of_sample_BE.dtype)
        return torch.cat(
            [
                repeat(of_sample_BE, "b e -> b m e", m=len(number_ME)),
                repeat(number_ME, "m e -> b m e", b=len(t_B)),
            ],
            dim=-1,
        )


class Double(nn.Module):
    """A block with two streams, and their rows of modulation."""

    recomputable = True

    def __init__(self, block: nn.Module, image_row: int, text_row: int):
        super().__init__()
        self.block, self.rows = block, (image_row, text_row)

    def forward(self, stream: ChromaStream) -> ChromaStream:
        rows = [stream.modulation_BMD[:, row : row + DOUBLE_ROWS] for row in self.rows]
        text_BLD, x_BTD = self.block(
            hidden_states=stream.x_BTD,
            encoder_hidden_states=stream.text_BLD,
            temb=torch.cat(rows, dim=1),
            image_rotary_emb=stream.rope_SD,
            attention_mask=stream.mask_BS,
        )
        return stream._replace(x_BTD=x_BTD, text_BLD=text_BLD)


class Single(nn.Module):
    """A block for text and image in one sequence, and its rows of modulation."""

    recomputable = True

    def __init__(self, block: nn.Module, row: int):
        super().__init__()
        self.block, self.row = block, row

    def forward(self, stream: ChromaStream) -> ChromaStream:
        stream = joined(stream)
        x_BSD = self.block(
            hidden_states=stream.x_BTD,
            temb=stream.modulation_BMD[:, self.row : self.row + SINGLE_ROWS],
            image_rotary_emb=stream.rope_SD,
            attention_mask=stream.mask_BS,
        )
        return stream._replace(x_BTD=x_BSD)


class Exit(nn.Module):
    """Projects the image tokens to the latent (B, C, h, w)."""

    def __init__(self, denoiser: ChromaTransformer2DModel):
        super().__init__()
        self.norm_out = denoiser.norm_out
        self.proj_out = denoiser.proj_out

    def forward(self, stream: ChromaStream) -> torch.Tensor:
        x_BTC = self.proj_out(self.norm_out(picture_of(stream), stream.modulation_BMD[:, -EXIT_ROWS:]))
        height, width, _ = stream.canvas_hw0.shape
        return unpack(x_BTC, height, width)


class ChromaPipeline(FluxPipeline):
    """Chroma of Lodestone Rock: Flux.1 schnell, made smaller."""

    Options = ChromaOptions
    spec_architecture = "chroma"
    denoiser_class = "ChromaTransformer2DModel"
    text_parts = (TextPart("t5", "T5EncoderModel"),)
    stream_type = ChromaStream
    original_layout = CHROMA_LAYOUT
    guided_by_second_prediction = True
    max_controls = 0

    def encoders(self, controls: int = 0) -> list[ModelEncoder]:
        # Chroma sees one token of the padding, and masks the rest.
        features = TrueLengthFeatures("t5", self.options.max_sequence_length, padding_tokens=1)
        return [self.autoencoder(), self.parts.text_encoder(features)]

    def to_layers(self, denoiser: ChromaTransformer2DModel) -> list[nn.Module]:
        doubles, singles = denoiser.transformer_blocks, denoiser.single_transformer_blocks
        image = SINGLE_ROWS * len(singles)
        text = image + DOUBLE_ROWS * len(doubles)
        return [
            Entry(denoiser),
            *(Double(block, image + DOUBLE_ROWS * i, text + DOUBLE_ROWS * i) for i, block in enumerate(doubles)),
            *(Single(block, SINGLE_ROWS * i) for i, block in enumerate(singles)),
            Exit(denoiser),
        ]

    def prepare_inputs(
        self, features: Features, x_t: torch.Tensor, t_B: torch.Tensor, guidance: float | None = None
    ) -> ChromaInputs:
        height, width = x_t.shape[2:]
        text_positions = torch.zeros(features["t5"].shape[1], 3)
        text_mask_BL = features["t5_mask"].bool()
        return ChromaInputs(
            x_BTC=pack(x_t),
            text_BLD=features["t5"],
            # With a mask, even of ones, attention is slower.
            text_mask_BL=None if text_mask_BL.all() else text_mask_BL,
            t_B=t_B,
            positions_S3=torch.cat([text_positions, grid_positions(height, width, image=0)]),
            canvas_hw0=torch.empty(height, width, 0),
        )
