"""LTX-2 and LTX-2.3: blocks of two streams, for video and for sound, of which the video's is trained.

Each block lets the two streams look at each other. Where there is no sound, or the stock module is told to isolate the
streams, the video's is a chain by itself, and what belongs to sound is not even read: a third of the weights.

Shapes: B batch, C latent channels, f h w latent frames, height and width, T video tokens, L text tokens, R rows of
time, D width of the transformer, M modulations of a block, H heads, E rotary frequencies of a head.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from einops import rearrange
from torch import nn

from models.base import Features, ModelEncoder
from models.foundation.checkpoints.denoiser import PartialDenoiserWeights
from models.foundation.checkpoints.folders import TextPart
from models.foundation.checkpoints.layouts.ltx2 import LTX2_LAYOUT
from models.foundation.encoders.gemma3_connected import (
    CONNECTORS_PATH,
    FOR_PICTURES,
    NEEDED,
    ConnectedFeatures,
    ConnectedGemma,
    connectors_config,
    text_width,
)
from models.foundation.encoders.ltx_vae import LTX2Autoencoder
from models.foundation.encoders.text import TextEncoder
from models.foundation.layers.chain import Middle
from models.foundation.layers.given import of_tokens, row_of_token, with_given_frames
from models.ltx_video import TRAIN_STEPS, Exit, LTXVideoPipeline
from utils.dataset.buckets import MediaFacts
from utils.errors import Problem
from utils.settings.model_schema import ModelSettings
from utils.settings.values import Count, Part, Positive, UserPath

if TYPE_CHECKING:
    from diffusers import LTX2VideoTransformer3DModel
    from diffusers.models.transformers.transformer_ltx2 import LTX2AudioVideoRotaryPosEmbed, LTX2VideoTransformerBlock

OF_SOUND = re.compile(r"audio|a2v|av_cross_attn|cross_attn_rope")
"""Part of the names of modules and parameters, of the model and of a block, that the video's stream does not pass."""
PUBLISHED_CELL = (8, 32, 32)
"""How many frames, rows and columns of pixels a latent cell covers."""
OF_TEXT_QUERIES = slice(6, 9)
"""The modulations of what looks at the text, which LTX-2.3 has behind the six of attention and feed-forward."""


class LTX2Options(ModelSettings):
    """`[model]` of `type = "ltx2"`."""

    max_sequence_length: Count = 1024
    """Number of Gemma tokens that the model sees, with those that it has learned for what a caption lacks; a multiple
    of 128. The cache takes 8 MB for a caption of 1024."""
    frame_rate: Positive = 24.0
    """Frames per second of clips, which the model is told: they are read at this rate, and samples have it."""
    first_frame_share: Part = 0.0
    """The share of the clips that are trained from their first frame, which the model then receives without noise and
    does not have to predict; the others are trained from text alone."""
    connectors_path: UserPath | None = None
    """File with the connectors, which make the model's text of Gemma's states. Default: from `diffusers_path`; for
    single files `transformer_path`, if it is Lightricks' checkpoint."""


class LTX2Inputs(NamedTuple):
    """The inputs of the entry. Time has a row for each frame if some are given; the noise level is that of the others.
    Places say where a token begins and ends, in seconds and pixels. `canvas_fhw0` has no elements: its shape carries
    the latent's."""

    x_BTC: torch.Tensor
    text_BLD: torch.Tensor
    t_BR: torch.Tensor
    level_B: torch.Tensor
    places_13T2: torch.Tensor
    canvas_fhw0: torch.Tensor


class LTX2Stream(NamedTuple):
    """What travels from layer to layer. With rows of time for the frames, `row_T` has the row of each token, by which
    each layer looks up the modulations. Those of the text are LTX-2.3's."""

    x_BTD: torch.Tensor
    text_BLD: torch.Tensor
    modulation_BRM: torch.Tensor
    text_modulation_B1M: torch.Tensor | None
    time_BRD: torch.Tensor
    row_T: torch.Tensor | None
    places_13T2: torch.Tensor
    rope: tuple[torch.Tensor, torch.Tensor]
    canvas_fhw0: torch.Tensor

    @property
    def modulation(self) -> torch.Tensor:
        """The modulation for a block: (B, 1, M D), or (B, T, M D)."""
        return of_tokens(self.modulation_BRM, self.row_T)

    @property
    def rope_of_all(self) -> tuple[torch.Tensor, ...]:
        """The rotary tables, (B, T, D) or (B, H, T, E): stock attention takes the number of samples from them."""
        return tuple(table.expand(len(self.x_BTD), *table.shape[1:]) for table in self.rope)


class Entry(nn.Module):
    """Embeds cells, text, time and places. Each stage makes the rotary tables itself, which in float32 are larger than
    all that blocks change."""

    remakes = ("rope",)

    def __init__(self, denoiser: LTX2VideoTransformer3DModel):
        super().__init__()
        self.rope = denoiser.rope
        self.proj_in = denoiser.proj_in
        self.time_embed = denoiser.time_embed
        self.caption_projection = getattr(denoiser, "caption_projection", None)
        self.prompt_adaln = getattr(denoiser, "prompt_adaln", None)

    def forward(self, inputs: LTX2Inputs) -> LTX2Stream:
        weight, (samples, rows) = self.proj_in.weight, inputs.t_BR.shape
        _, height, width, _ = inputs.canvas_fhw0.shape
        # The time stays float32 until it is embedded.
        modulation_EM, time_ED = self.time_embed(
            inputs.t_BR.flatten() * TRAIN_STEPS, batch_size=samples, hidden_dtype=weight.dtype
        )
        text_BLD, text_modulation_B1M = inputs.text_BLD.to(weight.dtype), None
        if self.caption_projection is not None:
            text_BLD = self.caption_projection(text_BLD)
        if self.prompt_adaln is not None:
            modulation_BM, _ = self.prompt_adaln(
                inputs.level_B * TRAIN_STEPS, batch_size=samples, hidden_dtype=weight.dtype
            )
            text_modulation_B1M = modulation_BM.unsqueeze(1)
        return LTX2Stream(
            x_BTD=self.proj_in(inputs.x_BTC.to(weight.dtype)),
            text_BLD=text_BLD,
            modulation_BRM=rearrange(modulation_EM, "(b r) m -> b r m", r=rows),
            text_modulation_B1M=text_modulation_B1M,
            time_BRD=rearrange(time_ED, "(b r) d -> b r d", r=rows),
            row_T=row_of_token(rows, height * width, weight.device),
            places_13T2=inputs.places_13T2,
            # They are the same for all samples.
            rope=self.rope(inputs.places_13T2),
            canvas_fhw0=inputs.canvas_fhw0,
        )

    def remake(self, stream: LTX2Stream) -> dict[str, Any]:
        """The fields that are not sent from stage to stage."""
        return {"rope": self.rope(stream.places_13T2)}


class VideoHalf(nn.Module):
    """What a block does to the video, when the streams are isolated."""

    def __init__(self, block: LTX2VideoTransformerBlock):
        super().__init__()
        self.block = block

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        temb: torch.Tensor,
        temb_prompt: torch.Tensor | None,
        video_rotary_emb: tuple[torch.Tensor, torch.Tensor],
    ) -> torch.Tensor:
        block, x_BTD, text_BLD, samples = self.block, hidden_states, encoder_hidden_states, len(hidden_states)
        modulations = block.get_mod_params(block.scale_shift_table, temb, samples)
        shift, scale, gate, ff_shift, ff_scale, ff_gate = modulations[:6]

        attended = block.attn1(block.norm1(x_BTD) * (1 + scale) + shift, query_rotary_emb=video_rotary_emb)
        x_BTD = x_BTD + attended * gate

        queries = block.norm2(x_BTD)
        if block.video_cross_attn_adaln:
            query_shift, query_scale, query_gate = modulations[OF_TEXT_QUERIES]
            queries = queries * (1 + query_scale) + query_shift
        if block.cross_attn_adaln:
            text_shift, text_scale = block.get_mod_params(block.prompt_scale_shift_table, temb_prompt, samples)
            text_BLD = text_BLD * (1 + text_scale) + text_shift
        read = block.attn2(queries, encoder_hidden_states=text_BLD)
        x_BTD = x_BTD + (read * query_gate if block.video_cross_attn_adaln else read)

        return x_BTD + block.ff(block.norm3(x_BTD) * (1 + ff_scale) + ff_shift) * ff_gate


class LTX2Pipeline(LTXVideoPipeline):
    """LTX-2 and LTX-2.3 of Lightricks: text to video, and from a first frame. Sound is neither read nor made. What is
    trained, and what samples are drawn with, is the video's stream alone, as the stock model has it with
    `isolate_modalities`: the two streams do not look at each other. What belongs to sound, a third of the weights, is
    not loaded. In the export of a full fine-tune it is as it was, and adapters have no part in it; of those that others
    have made for both streams that part is left out, with a word. An export makes video with sound as the base does;
    the video has been trained without looking at it. Of the stock pipeline's kinds of guidance samples have the one by
    the negative prompt."""

    Options = LTX2Options
    denoiser_class = "LTX2VideoTransformer3DModel"
    config_keys = ("in_channels", "num_attention_heads", "attention_head_dim")
    text_parts = (TextPart("gemma3", "Gemma3Model", vision=FOR_PICTURES),)
    media = MediaFacts(spatial=32, temporal=8, max_frames=481, fps=24.0)
    stream_type = LTX2Stream
    original_layout = LTX2_LAYOUT
    comfyui_note = (
        "ComfyUI's file of a full fine-tune has the denoiser alone: take the connectors (`video_embeddings_connector` "
        "and `audio_embeddings_connector`) from the base's checkpoint; files of adapters are complete"
    )
    autoencoder_class = LTX2Autoencoder

    def problems_of_parts(self) -> Iterator[Problem]:
        config, made = self.parts.denoiser_config, self._vae_config["latent_channels"]
        if config["in_channels"] != made:
            yield self.parts.misfit(
                f"takes latents of {config['in_channels']} channels and the VAE makes {made}; give LTX-2's own VAE"
            )
        if config.get("use_keyframes_abs_pos_embedding") or not config.get("use_prompt_adaln_single", True):
            yield self.parts.misfit("is LTX-2.5, which is not trained here; give LTX-2 or LTX-2.3")
        yield from self.problems_of_patches()
        group, *cell = config.get("vae_scale_factors", PUBLISHED_CELL)
        if (group, *cell) != (self.media.temporal, self.media.spatial, self.media.spatial):
            yield self.parts.misfit(
                f"counts {group} frames and {cell[0]} x {cell[1]} pixels to a cell, and the VAE's have "
                f"{self.media.temporal} and {self.media.spatial} x {self.media.spatial}; give LTX-2's own VAE"
            )
        if self.options.architecture and self._connectors is None:
            yield Problem("", CONNECTORS_PATH, f"is required without a checkpoint: {NEEDED}")
        yield from self._problems_of_text(config, connectors_config(self.options.diffusers_path))

    def _problems_of_text(self, config: dict[str, Any], connectors: dict[str, Any]) -> Iterator[Problem]:
        """Why Gemma, connectors and denoiser do not fit one another."""
        gemma = self._text_encoder().config().get_text_config()
        read = connectors["text_proj_in_factor"], connectors["caption_channels"]
        made = gemma.num_hidden_layers + 1, gemma.hidden_size
        if read != made:
            yield self.parts.misfit(
                f"has connectors that read {read[0]} states of {read[1]} features for each token, and Gemma has "
                f"{made[0]} of {made[1]}; give Gemma 3 12B"
            )
        projects = config.get("use_prompt_embeddings", True)
        asked = config["caption_channels"] if projects else config["num_attention_heads"] * config["attention_head_dim"]
        if asked != text_width(connectors):
            yield self.parts.misfit(
                f"takes text of {asked} features and the connectors make {text_width(connectors)}; give the connectors "
                "of the same model"
            )
        registers = connectors.get("video_connector_num_learnable_registers", 128)
        length = self.options.max_sequence_length
        if registers and length % registers:
            message = f"{length} is no multiple of {registers}, as many learned tokens as the connectors have"
            yield Problem("", "[model] max_sequence_length", message)

    def encoders(self, controls: int = 0) -> list[ModelEncoder]:
        return [self.autoencoder(), self._text_encoder()]

    def _text_encoder(self) -> TextEncoder:
        width = text_width(connectors_config(self.options.diffusers_path))
        features = ConnectedFeatures("gemma3", self.options.max_sequence_length, width)
        return self.parts.text_encoder(features, ConnectedGemma, connectors=self._connectors)

    @property
    def _connectors(self) -> Path | None:
        """The file with the connectors, if they are not in the folder."""
        options = self.options
        of_checkpoint = options.transformer_path if options.architecture else None
        return options.connectors_path or of_checkpoint

    def build_denoiser(self) -> nn.Module:
        """The stock module without what belongs to sound."""
        denoiser = super().build_denoiser()
        for module in (denoiser, *denoiser.transformer_blocks):
            for name in [*dict(module.named_children()), *dict(module.named_parameters(recurse=False))]:
                if OF_SOUND.search(name):
                    delattr(module, name)
        return denoiser

    @property
    def weights(self) -> PartialDenoiserWeights:
        of_video = super().weights
        return PartialDenoiserWeights(**vars(of_video), whole=super().build_denoiser)

    def to_layers(self, denoiser: LTX2VideoTransformer3DModel) -> list[nn.Module]:
        reads = {
            "hidden_states": "x_BTD",
            "encoder_hidden_states": "text_BLD",
            "temb": "modulation",
            "temb_prompt": "text_modulation_B1M",
            "video_rotary_emb": "rope_of_all",
        }
        middles = [Middle(VideoHalf(block), reads, writes=("x_BTD",)) for block in denoiser.transformer_blocks]
        return [Entry(denoiser), *middles, Exit(denoiser)]

    def prepare_inputs(
        self, features: Features, x_t: torch.Tensor, t_B: torch.Tensor, guidance: float | None = None
    ) -> LTX2Inputs:
        x_BCfhw, t_BR = with_given_frames(features, x_t, t_B)
        frames, height, width = x_t.shape[2:]
        return LTX2Inputs(
            x_BTC=rearrange(x_BCfhw, "b c f h w -> b (f h w) c"),
            text_BLD=features["gemma3"],
            t_BR=t_BR,
            level_B=t_B,
            places_13T2=self.rope.prepare_video_coords(1, frames, height, width, x_t.device, fps=self.media.fps),
            canvas_fhw0=torch.empty(frames, height, width, 0),
        )

    # Kept, as every micro-batch asks for it.
    @cached_property
    def rope(self) -> LTX2AudioVideoRotaryPosEmbed:
        """What knows the places of tokens."""
        from diffusers.models.transformers.transformer_ltx2 import LTX2AudioVideoRotaryPosEmbed

        config = self.parts.denoiser_config
        width = config["num_attention_heads"] * config["attention_head_dim"]
        cell, offset = config.get("vae_scale_factors", PUBLISHED_CELL), config.get("causal_offset", 1)
        return LTX2AudioVideoRotaryPosEmbed(width, scale_factors=tuple(cell), causal_offset=offset)
