"""Stable Diffusion 3 and 3.5, all sizes: the folder's configuration tells them apart.

Shapes: B batch, T image tokens, L text tokens, P pooled text features, C latent channels, D width, h w latent cells.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import nn

from models.base import Features, ModelEncoder
from models.families.pictures import PicturePipeline
from models.foundation.checkpoints.folders import TextPart
from models.foundation.checkpoints.key_layouts import KeyLayout
from models.foundation.checkpoints.layouts.sd3 import POSITIONS, mmdit_layout
from models.foundation.encoders.clip import ClipEncoder, ClipFeatures
from models.foundation.encoders.text import TextEncoder
from models.foundation.encoders.text_features import T5Features
from models.foundation.layers.chain import Middle
from models.foundation.layers.patches import unpatchify
from utils.errors import Problem, UserError
from utils.settings.model_schema import ModelSettings
from utils.settings.values import Count

if TYPE_CHECKING:
    from diffusers import SD3Transformer2DModel

logger = logging.getLogger(__name__)

TRAIN_STEPS = 1000
CLIP_TOKENS = 77
CLIPS = ("clip_l", "clip_g")
TEXT_PARTS = (
    TextPart("clip_l", "CLIPTextModelWithProjection"),
    TextPart("clip_g", "CLIPTextModelWithProjection", "text_encoder_2", "tokenizer_2"),
    TextPart("t5", "T5EncoderModel", "text_encoder_3", "tokenizer_3"),
)


class Sd3Options(ModelSettings):
    """`[model]` of `type = "sd3"`."""

    max_sequence_length: Count = 256
    """Number of T5 tokens, including padding, that the model sees behind the 77 of CLIP."""
    drop_text_encoders: list[Literal["clip_l", "clip_g", "t5"]] = []
    """Text encoders to leave out: the model sees zeros instead, which it has learned. Encoders that the folder lacks
    are left out too."""


class Sd3Inputs(NamedTuple):
    """The inputs of the entry."""

    x_BChw: torch.Tensor
    text_BLD: torch.Tensor
    pooled_BP: torch.Tensor
    t_B: torch.Tensor


class Sd3Stream(NamedTuple):
    """What travels from layer to layer. The last block leaves no text; `canvas_hw0` has no elements: its shape carries
    the latent's height and width."""

    x_BTD: torch.Tensor
    text_BLD: torch.Tensor | None
    time_BD: torch.Tensor
    canvas_hw0: torch.Tensor


class Entry(nn.Module):
    """Embeds patches with their positions, text, and time with the pooled text."""

    def __init__(self, denoiser: SD3Transformer2DModel):
        super().__init__()
        self.pos_embed = denoiser.pos_embed
        self.context_embedder = denoiser.context_embedder
        self.time_text_embed = denoiser.time_text_embed

    def forward(self, inputs: Sd3Inputs) -> Sd3Stream:
        weight = self.context_embedder.weight
        return Sd3Stream(
            x_BTD=self.pos_embed(inputs.x_BChw.to(weight.dtype)).contiguous(),
            text_BLD=self.context_embedder(inputs.text_BLD.to(weight.dtype)),
            # The time stays float32 until it is embedded.
            time_BD=self.time_text_embed(inputs.t_B * TRAIN_STEPS, inputs.pooled_BP.to(weight.dtype)),
            canvas_hw0=torch.empty(*inputs.x_BChw.shape[2:], 0, device=weight.device),
        )


class Exit(nn.Module):
    """Projects the image tokens to the latent (B, C, h, w)."""

    def __init__(self, denoiser: SD3Transformer2DModel):
        super().__init__()
        self.norm_out = denoiser.norm_out
        self.proj_out = denoiser.proj_out

    def forward(self, stream: Sd3Stream) -> torch.Tensor:
        height, width, _ = stream.canvas_hw0.shape
        return unpatchify(self.proj_out(self.norm_out(stream.x_BTD, stream.time_BD)), height, width)


class Sd3Pipeline(PicturePipeline):
    """Stable Diffusion 3 medium and 3.5 medium, large and turbo, of Stability AI."""

    Options = Sd3Options
    spec_architecture = "stable-diffusion-3"
    denoiser_class = "SD3Transformer2DModel"
    config_keys = ("in_channels", "pooled_projection_dim", "joint_attention_dim", "num_layers")
    scheduler_sets_levels = True
    # Its second attention is of the image alone.
    cross_attention = ()
    blocks = ("transformer_blocks",)
    stream_type = Sd3Stream
    keep_in_high_precision = (POSITIONS,)
    guided_by_second_prediction = True

    @cached_property
    def original_layout(self) -> KeyLayout:
        return mmdit_layout(self.parts.denoiser_config["num_layers"])

    @cached_property
    def text_parts(self) -> tuple[TextPart, ...]:
        """The text encoders that exist and are not dropped."""
        options = self.options
        return tuple(
            _pooled_as_published(part, part.override(options))
            for part in TEXT_PARTS
            if part.name not in options.drop_text_encoders
            and ((options.diffusers_path / part.folder).is_dir() or part.override(options))
        )

    def check_folder(self) -> None:
        self._check_choice()
        super().check_folder()

    def _check_choice(self) -> None:
        """Whether any text encoder is left, and none is both given and dropped."""
        folder, dropped = self.options.diffusers_path, self.options.drop_text_encoders
        if both := [entry.type for entry in self.options.text_encoders if entry.type in dropped]:
            raise UserError.of(
                f"drops '{both[0]}', for which text_encoders gives a file; leave one of them out",
                where="[model] drop_text_encoders",
            )
        if not self.text_parts:
            raise UserError.of(
                "no text encoder is left, and the model would see no captions; drop fewer, or download text_encoder, "
                "text_encoder_2 or text_encoder_3 with its tokenizer",
                str(folder),
            )
        present = [part.name for part in self.text_parts]
        absent = [part for part in TEXT_PARTS if part.name not in (*present, *dropped)]
        for part in absent:
            logger.warning("there is no %s in %s: the model sees zeros instead of %s", part.folder, folder, part.name)

    def problems_of_parts(self) -> Iterator[Problem]:
        config, made = self.parts.denoiser_config, self.vae_config["latent_channels"]
        channels, pooled, width = config["in_channels"], config["pooled_projection_dim"], config["joint_attention_dim"]
        shapes = {key: shape for encoder in self._text_encoders() for key, shape in encoder.shapes.items()}
        clips = {name: shapes[name] for name in CLIPS if name in shapes}
        widths = [features for _, features in clips.values()]
        fits = all(shape == (CLIP_TOKENS, *shapes[f"{name}_pooled"]) for name, shape in clips.items())
        # Together they have the width that the model requires; an encoder that is left out leaves room.
        fits = fits and (sum(widths) == pooled if len(widths) == len(CLIPS) else sum(widths) < pooled)
        if channels != made:
            yield self.parts.misfit(
                f"takes latents of {channels} channels and the VAE makes {made}; give SD3's own VAE"
            )
        if not fits:
            yield self.parts.misfit(
                f"takes {CLIP_TOKENS} tokens with {pooled} features of CLIP-L and CLIP-G together, and as many pooled; "
                f"the encoders here make {clips}; give SD3's own"
            )
        if "t5" in shapes and shapes["t5"][1] != width:
            yield self.parts.misfit(f"takes text of {width} features and T5 makes {shapes['t5']}; give T5 v1.1 XXL")

    @property
    def places(self) -> tuple[int, int]:
        side = self.parts.denoiser_config["pos_embed_max_size"]
        return side, side

    def encoders(self, controls: int = 0) -> list[ModelEncoder]:
        return [self.autoencoder(), *self._text_encoders()]

    def _text_encoders(self) -> list[TextEncoder]:
        t5 = T5Features(self.options.max_sequence_length)
        return [self._clip(part) if part.name in CLIPS else self.parts.text_encoder(t5) for part in self.text_parts]

    def _clip(self, part: TextPart) -> TextEncoder:
        length = self.parts.text_config(part.name)["max_position_embeddings"]
        pooled = "text_embeds" if part.model_class == "CLIPTextModelWithProjection" else "pooler_output"
        return self.parts.text_encoder(ClipFeatures(part.name, length, pooled), ClipEncoder)

    def build_denoiser(self) -> SD3Transformer2DModel:
        # The table of positions takes seconds and gigabytes to compute, and the files contain it.
        with nullcontext() if self.options.from_scratch else torch.device("meta"):
            denoiser = super().build_denoiser()
        positions = denoiser.pos_embed.pos_embed
        del denoiser.pos_embed.pos_embed
        # As a frozen parameter it is read, and exported, with the rest.
        denoiser.pos_embed.pos_embed = nn.Parameter(positions, requires_grad=False)
        return denoiser

    def to_layers(self, denoiser: SD3Transformer2DModel) -> list[nn.Module]:
        reads = {"hidden_states": "x_BTD", "encoder_hidden_states": "text_BLD", "temb": "time_BD"}
        middles = [Middle(block, reads, writes=("text_BLD", "x_BTD")) for block in denoiser.transformer_blocks]
        return [Entry(denoiser), *middles, Exit(denoiser)]

    def prepare_inputs(
        self, features: Features, x_t: torch.Tensor, t_B: torch.Tensor, guidance: float | None = None
    ) -> Sd3Inputs:
        return Sd3Inputs(x_t, *self._conditions(features, len(x_t)), t_B)

    def _conditions(self, features: Features, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Text tokens (B, L, D) and pooled text (B, P), with zeros for missing encoders: CLIP-L and CLIP-G are
        concatenated in the first tokens, and T5 follows in the others."""
        config = self.parts.denoiser_config
        tokens, pooled_width = CLIP_TOKENS + self.options.max_sequence_length, config["pooled_projection_dim"]
        text_BLD = torch.zeros(batch, tokens, config["joint_attention_dim"], dtype=self.dtype)
        pooled_BP = torch.zeros(batch, pooled_width, dtype=self.dtype)
        for name in CLIPS:
            if name in features:
                width = features[name].shape[2]
                start = 0 if name == "clip_l" else pooled_width - width
                text_BLD[:, :CLIP_TOKENS, start : start + width] = features[name]
                pooled_BP[:, start : start + width] = features[f"{name}_pooled"]
        if "t5" in features:
            text_BLD[:, CLIP_TOKENS:] = features["t5"]
        return text_BLD, pooled_BP


def _pooled_as_published(part: TextPart, override: Path | None) -> TextPart:
    """SD3 pools CLIP-L without a projection. In its own folder the projection is the identity; the files that ComfyUI
    reads contain CLIP's original projection, or none."""
    is_single_file = part.name == "clip_l" and override is not None and override.is_file()
    return replace(part, model_class="CLIPTextModel") if is_single_file else part
