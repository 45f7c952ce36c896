"""LTX-Video 0.9: one chain of blocks over the cells of a strongly compressed latent, which attend to the text.

Shapes: B batch, C latent channels, f h w latent frames, height and width, T video tokens, L text tokens, R rows of
time, D width of the transformer, M modulations of a block.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from einops import rearrange
from torch import nn

from models.base import BasePipeline, Features, ModelEncoder
from models.families.clips import problems_of_rates
from models.foundation.checkpoints.configs import stock_scheduler
from models.foundation.checkpoints.folders import TextPart
from models.foundation.checkpoints.layouts.ltx_video import LTX_VIDEO_LAYOUT
from models.foundation.encoders.ltx_vae import LTXAutoencoder, compression_of, ltx_latent_size
from models.foundation.encoders.text_features import EncodedText, MaskedHiddenStates
from models.foundation.layers.chain import Middle
from models.foundation.layers.given import of_tokens, row_of_token, with_given_frames
from utils.dataset.buckets import MediaFacts
from utils.dataset.samples import Sample
from utils.diffusion.timesteps import RESOLUTION_SHIFTS
from utils.errors import Problem, UserError
from utils.settings.model_schema import ModelSettings
from utils.settings.values import Count, Part, Positive

if TYPE_CHECKING:
    from diffusers import FlowMatchEulerDiscreteScheduler, LTXVideoTransformer3DModel

TRAIN_STEPS = 1000


class LTXVideoOptions(ModelSettings):
    """`[model]` of `type = "ltx_video"`."""

    max_sequence_length: Count = 128
    """Number of T5 tokens of a caption that are read; 256 in the later models' pipelines."""
    frame_rate: Positive = 25.0
    """Frames per second of clips, which the model is told: they are read at this rate, and samples have it."""
    first_frame_share: Part = 0.0
    """The share of the clips that are trained from their first frame, which the model then receives without noise and
    does not have to predict; the others are trained from text alone. Its publisher trains with 0.1 to 0.5."""


class LTXVideoInputs(NamedTuple):
    """The inputs of the entry. Time has a row for each frame if some are given. `canvas_fhw0` has no elements: its
    shape carries the latent's."""

    x_BTC: torch.Tensor
    text_BLD: torch.Tensor
    text_mask_BL: torch.Tensor | None
    t_BR: torch.Tensor
    canvas_fhw0: torch.Tensor


class LTXVideoStream(NamedTuple):
    """What travels from layer to layer. With rows of time for the frames, `row_T` has the row of each token, by which
    each layer looks up the modulations."""

    x_BTD: torch.Tensor
    text_BLD: torch.Tensor
    text_mask_B1L: torch.Tensor | None
    modulation_BRM: torch.Tensor
    time_BRD: torch.Tensor
    row_T: torch.Tensor | None
    rope_1TD: tuple[torch.Tensor, torch.Tensor]
    canvas_fhw0: torch.Tensor

    @property
    def modulation(self) -> torch.Tensor:
        """The modulation for a block: (B, 1, M D), or (B, T, M D)."""
        return of_tokens(self.modulation_BRM, self.row_T)


class Entry(nn.Module):
    """Embeds cells, text, time and positions. Each stage makes the rotary tables itself, which in float32 are larger
    than all that blocks change.

    Args:
        scale: what the positions of a latent are multiplied with to be seconds and pixels.
    """

    remakes = ("rope_1TD",)

    def __init__(self, denoiser: LTXVideoTransformer3DModel, scale: tuple[float, int, int]):
        super().__init__()
        self.rope = denoiser.rope
        self.proj_in = denoiser.proj_in
        self.time_embed = denoiser.time_embed
        self.caption_projection = denoiser.caption_projection
        self.scale = scale

    def forward(self, inputs: LTXVideoInputs) -> LTXVideoStream:
        weight, (samples, rows) = self.proj_in.weight, inputs.t_BR.shape
        _, height, width, _ = inputs.canvas_fhw0.shape
        # The time stays float32 until it is embedded.
        modulation_EM, time_ED = self.time_embed(
            inputs.t_BR.flatten() * TRAIN_STEPS, batch_size=samples, hidden_dtype=weight.dtype
        )
        mask_BL = inputs.text_mask_BL
        return LTXVideoStream(
            x_BTD=self.proj_in(inputs.x_BTC.to(weight.dtype)),
            text_BLD=self.caption_projection(inputs.text_BLD.to(weight.dtype)),
            text_mask_B1L=None if mask_BL is None else mask_BL.unsqueeze(1),
            modulation_BRM=rearrange(modulation_EM, "(b r) m -> b r m", r=rows),
            time_BRD=rearrange(time_ED, "(b r) d -> b r d", r=rows),
            row_T=row_of_token(rows, height * width, weight.device),
            rope_1TD=self._rope(inputs.canvas_fhw0),
            canvas_fhw0=inputs.canvas_fhw0,
        )

    def remake(self, stream: LTXVideoStream) -> dict[str, Any]:
        """The fields that are not sent from stage to stage."""
        return {"rope_1TD": self._rope(stream.canvas_fhw0)}

    def _rope(self, canvas_fhw0: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The rotary tables, which are the same for all samples."""
        frames, height, width, _ = canvas_fhw0.shape
        return self.rope(canvas_fhw0.new_empty(1), frames, height, width, self.scale)


class Exit(nn.Module):
    """Projects the tokens to the latent (B, C, f, h, w)."""

    def __init__(self, denoiser: LTXVideoTransformer3DModel):
        super().__init__()
        self.norm_out = denoiser.norm_out
        self.proj_out = denoiser.proj_out
        self.scale_shift_table = denoiser.scale_shift_table

    def forward(self, stream: LTXVideoStream) -> torch.Tensor:
        time_BTD = of_tokens(stream.time_BRD, stream.row_T)
        shift_BTD, scale_BTD = (self.scale_shift_table + time_BTD.unsqueeze(2)).unbind(dim=2)
        x_BTC = self.proj_out(self.norm_out(stream.x_BTD) * (1 + scale_BTD) + shift_BTD)
        frames, height, _, _ = stream.canvas_fhw0.shape
        return rearrange(x_BTC, "b (f h w) c -> b c f h w", f=frames, h=height)


@dataclass(frozen=True)
class PaddedThenCutFeatures(MaskedHiddenStates):
    """The last hidden state of the tokens of each caption, (l, D) with l up to `length`, and a mask (l,) of ones. The
    encoder sees the padding up to `length` as text, as in LTX-Video's pipeline; the model does not."""

    name: str
    length: int

    def __call__(self, text_encoder: nn.Module, tokenizer: Any, captions: list[str]) -> EncodedText:
        tokens = tokenizer(captions, padding="max_length", max_length=self.length, truncation=True, return_tensors="pt")
        hidden_BLD = text_encoder(tokens.input_ids.to(text_encoder.device))[0]
        lengths = tokens.attention_mask.sum(1).tolist()
        return {
            self.name: [hidden[:length] for hidden, length in zip(hidden_BLD, lengths, strict=True)],
            f"{self.name}_mask": [torch.ones(length, dtype=torch.bool) for length in lengths],
        }


class LTXVideoPipeline(BasePipeline):
    """LTX-Video 0.9 of Lightricks: text to video, and from a first frame."""

    Options = LTXVideoOptions
    denoiser_class = "LTXVideoTransformer3DModel"
    config_keys = ("in_channels", "caption_channels")
    text_parts = (TextPart("t5", "T5EncoderModel"),)
    media = MediaFacts(spatial=32, temporal=8, max_frames=257, fps=25.0)
    blocks = ("transformer_blocks",)
    stream_type = LTXVideoStream
    resolution_shift = RESOLUTION_SHIFTS["ltx"]
    original_layout = LTX_VIDEO_LAYOUT
    guided_by_second_prediction = True
    noise_in_float32 = True
    autoencoder_class = LTXAutoencoder

    def __init__(self, options: LTXVideoOptions, seed: int = 0):
        super().__init__(options, seed)
        self.media = replace(self.media, fps=options.frame_rate)
        # `check` reports what an incomplete folder lacks.
        with suppress(UserError):
            spatial, temporal = compression_of(self._vae_config)
            self.media = replace(self.media, spatial=spatial, temporal=temporal)

    def problems_of_parts(self) -> Iterator[Problem]:
        config, made = self.parts.denoiser_config, self._vae_config["latent_channels"]
        width, read = config["caption_channels"], self.parts.text_config("t5")["d_model"]
        if config["in_channels"] != made:
            yield self.parts.misfit(
                f"takes latents of {config['in_channels']} channels and the VAE makes {made}; give LTX-Video's own VAE"
            )
        if width != read:
            yield self.parts.misfit(f"takes text of {width} features and T5 makes {read}; give T5-XXL 1.1")
        yield from self.problems_of_patches()

    def problems_of_patches(self) -> Iterator[Problem]:
        """Why its tokens are not those of published models."""
        config = self.parts.denoiser_config
        sides = [config.get(name, 1) for name in ("patch_size", "patch_size_t")]
        if sides != [1, 1]:
            yield self.parts.misfit(
                f"takes patches of {sides[0]} x {sides[0]} cells and {sides[1]} frames together, and published models "
                "take each cell by itself; give one of those"
            )

    def problems_of_data(self, samples: Sequence[Sample]) -> list[Problem]:
        return problems_of_rates(samples, self.media.fps)

    def encoders(self, controls: int = 0) -> list[ModelEncoder]:
        return [
            self.autoencoder(),
            self.parts.text_encoder(PaddedThenCutFeatures("t5", self.options.max_sequence_length)),
        ]

    def autoencoder(self) -> LTXAutoencoder:
        """The VAE."""
        options = self.options
        return self.autoencoder_class(options.diffusers_path, options.vae_path, self.dtype, draw=options.latents)

    def to_layers(self, denoiser: LTXVideoTransformer3DModel) -> list[nn.Module]:
        reads = {
            "hidden_states": "x_BTD",
            "encoder_hidden_states": "text_BLD",
            "temb": "modulation",
            "image_rotary_emb": "rope_1TD",
            "encoder_attention_mask": "text_mask_B1L",
        }
        scale = (self.media.temporal / self.media.fps, self.media.spatial, self.media.spatial)
        middles = [Middle(block, reads, writes=("x_BTD",)) for block in denoiser.transformer_blocks]
        return [Entry(denoiser, scale), *middles, Exit(denoiser)]

    def prepare_inputs(
        self, features: Features, x_t: torch.Tensor, t_B: torch.Tensor, guidance: float | None = None
    ) -> LTXVideoInputs:
        x_t, t_BR = with_given_frames(features, x_t, t_B)
        text_mask_BL = features["t5_mask"].bool()
        return LTXVideoInputs(
            x_BTC=rearrange(x_t, "b c f h w -> b (f h w) c"),
            text_BLD=features["t5"],
            # With a mask, even of ones, attention is slower.
            text_mask_BL=None if text_mask_BL.all() else text_mask_BL,
            t_BR=t_BR,
            canvas_fhw0=torch.empty(*x_t.shape[2:], 0),
        )

    def given_frames(self, latent_shape: Sequence[int], quantile: float) -> int:
        return int(quantile < self.options.first_frame_share and latent_shape[-3] > 1)

    def tokens(self, latent_shape: Sequence[int]) -> int:
        *_, frames, height, width = latent_shape
        return frames * height * width

    def latent_shape(self, width: int, height: int, frames: int = 1) -> tuple[int, ...]:
        return ltx_latent_size(self._vae_config, width, height, frames)

    def scheduler(self) -> FlowMatchEulerDiscreteScheduler:
        return stock_scheduler(self.options.diffusers_path, "FlowMatchEulerDiscreteScheduler")

    # Kept, as every micro-batch asks for it.
    @cached_property
    def _vae_config(self) -> dict[str, Any]:
        return self.autoencoder_class.family.config(self.options.diffusers_path, self.options.vae_path)
