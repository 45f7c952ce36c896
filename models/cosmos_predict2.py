"""Cosmos-Predict2: one chain of blocks over latent patches that attend to the text.

It covers text to image, and video to world, which goes on from the first frames of a clip.

Shapes: B batch, C latent channels, f h w latent frames, height and width, T tokens, L text tokens, R rows of time, D
width of the transformer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from einops import rearrange
from torch import nn
from torch.nn import functional

from models.base import BasePipeline, Features, ModelEncoder
from models.families.clips import problems_of_rates
from models.foundation.checkpoints.configs import stock_scheduler
from models.foundation.checkpoints.folders import TextPart
from models.foundation.checkpoints.layouts.cosmos_predict2 import COSMOS_PREDICT2_LAYOUT
from models.foundation.encoders.first_frame import LoneFrameAutoencoder
from models.foundation.encoders.text_features import TrueLengthFeatures
from models.foundation.encoders.video_vae import WanAutoencoder, latent_size, wan_vae_config
from models.foundation.layers.chain import Middle
from models.foundation.layers.edm_steps import EdmSteps
from models.foundation.layers.given import is_given, row_of_token, with_given_frames
from models.foundation.layers.padding import lengthened
from utils.dataset.buckets import MediaFacts
from utils.dataset.samples import Sample
from utils.errors import Problem, UserError
from utils.settings.model_schema import ModelSettings
from utils.settings.values import Count, Part, Positive

if TYPE_CHECKING:
    from diffusers import CosmosTransformer3DModel

GIVEN_SIGMA = 1e-4
GIVEN_TIME = GIVEN_SIGMA / (1 + GIVEN_SIGMA)
"""What the model is told as the time of a frame that is given."""
OTHERS = {
    "use_crossattn_projection": "Cosmos-Predict2.5",
    "controlnet_block_every_n": "Cosmos-Transfer2.5",
    "img_context_dim_in": "Cosmos-Transfer2.5",
    "extra_pos_embed_type": "Cosmos 1.0",
}
"""Keys of the configuration that only other models set."""
OTHERS_BY_DEFAULT = {"extra_pos_embed_type": "learnable"}


class CosmosPredict2Options(ModelSettings):
    """`[model]` of `type = "cosmos_predict2"`."""

    max_sequence_length: Count = 512
    """Number of T5 tokens that the model sees, including padding."""
    frame_rate: Positive = 16.0
    """Frames per second of clips, which the model is told: they are read at this rate, and samples have it. 10 for the
    models of that rate."""
    second_frame_share: Part = 0.5
    """Of video to world: the share of the clips that are trained from two latent frames, which are the first five of
    the clip, and not from its first alone."""


class CosmosPredict2Inputs(NamedTuple):
    """The inputs of the entry; `x_BCfhw` has the channels of the masks too. Time has a row for each frame if some are
    given. `given_BC1hw` is the velocity that a given first frame has, for samples."""

    x_BCfhw: torch.Tensor
    text_BLD: torch.Tensor
    t_BR: torch.Tensor
    given_BC1hw: torch.Tensor | None


class CosmosPredict2Stream(NamedTuple):
    """What travels from layer to layer. `canvas_fhw0` has no elements: its shape carries the tokens' grid. With rows
    of time for the frames, `row_T` has the row of each token, by which each layer looks up what it needs; else the
    dimension R is missing."""

    x_BTD: torch.Tensor
    text_BLD: torch.Tensor
    modulation_BRM: torch.Tensor
    time_BRD: torch.Tensor
    row_T: torch.Tensor | None
    rope_TE: tuple[torch.Tensor, torch.Tensor]
    given_BC1hw: torch.Tensor | None
    canvas_fhw0: torch.Tensor

    @property
    def modulation(self) -> torch.Tensor:
        """The modulation for a layer: (B, 3 D), or (B, T, 3 D)."""
        return self.modulation_BRM if self.row_T is None else self.modulation_BRM[:, self.row_T]

    @property
    def time(self) -> torch.Tensor:
        """The time for a layer: (B, D), or (B, T, D)."""
        return self.time_BRD if self.row_T is None else self.time_BRD[:, self.row_T]


class Entry(nn.Module):
    """Embeds patches, time and positions."""

    def __init__(self, denoiser: CosmosTransformer3DModel, fps: float):
        super().__init__()
        self.rope = denoiser.rope
        self.patch_embed = denoiser.patch_embed
        self.time_embed = denoiser.time_embed
        self.fps = fps

    def forward(self, inputs: CosmosPredict2Inputs) -> CosmosPredict2Stream:
        x_BCfhw = inputs.x_BCfhw.to(self.patch_embed.proj.weight.dtype)
        patches_BfhwD = self.patch_embed(x_BCfhw)
        x_BTD = rearrange(patches_BfhwD, "b f h w d -> b (f h w) d")
        rows, (frames, height, width) = inputs.t_BR.shape[1], patches_BfhwD.shape[1:4]
        # The time stays float32 until it is embedded.
        modulation_EM, time_ED = self.time_embed(x_BTD, inputs.t_BR.flatten())
        return CosmosPredict2Stream(
            x_BTD=x_BTD,
            text_BLD=inputs.text_BLD.to(x_BTD.dtype),
            modulation_BRM=of_rows(modulation_EM, rows),
            time_BRD=of_rows(time_ED, rows),
            row_T=row_of_token(rows, height * width, x_BTD.device),
            rope_TE=self.rope(x_BCfhw, fps=self.fps),
            given_BC1hw=inputs.given_BC1hw,
            canvas_fhw0=x_BTD.new_empty(frames, height, width, 0),
        )


def of_rows(of_all_ED: torch.Tensor, rows: int) -> torch.Tensor:
    """(B, R, D) of (B R, D), or (B, D) for one row. A view of that in each layer would add the gradients of its uses in
    another order than the stock module does."""
    return rearrange(of_all_ED, "(b r) d -> b r d", r=rows) if rows > 1 else of_all_ED


class Exit(nn.Module):
    """Projects the tokens to the latent (B, C, f, h, w)."""

    def __init__(self, denoiser: CosmosTransformer3DModel):
        super().__init__()
        self.norm_out = denoiser.norm_out
        self.proj_out = denoiser.proj_out
        self.patch = tuple(denoiser.config.patch_size)

    def forward(self, stream: CosmosPredict2Stream) -> torch.Tensor:
        x_BTC = self.proj_out(self.norm_out(stream.x_BTD, stream.time, stream.modulation))
        frames, height, width, _ = stream.canvas_fhw0.shape
        x_BCfhw = rearrange(
            x_BTC,
            "b (f h w) (q r p c) -> b c (f p) (h q) (w r)",
            **dict(zip("fhwpqr", (frames, height, width, *self.patch), strict=True)),
        )
        given_BC1hw = stream.given_BC1hw
        return x_BCfhw if given_BC1hw is None else torch.cat([given_BC1hw.to(x_BCfhw), x_BCfhw[:, :, 1:]], dim=2)


class CosmosPredict2Pipeline(BasePipeline):
    """Cosmos-Predict2 of NVIDIA: text to image, which is trained on pictures alone, and video to world. NVIDIA's
    licence asks for its guardrail where the model is used; the samples of a run do not pass through one."""

    Options = CosmosPredict2Options
    denoiser_class = "CosmosTransformer3DModel"
    config_keys = ("in_channels", "text_embed_dim", "max_size")
    text_parts = (TextPart("t5", "T5EncoderModel"),)
    scheduler_sets_levels = True
    media = MediaFacts(spatial=16, temporal=4, max_frames=93, fps=16.0)
    blocks = ("transformer_blocks",)
    stream_type = CosmosPredict2Stream
    original_layout = COSMOS_PREDICT2_LAYOUT
    guided_by_second_prediction = True
    no_guidance = 0.0

    def __init__(self, options: CosmosPredict2Options, seed: int = 0):
        super().__init__(options, seed)
        self.media = replace(self.media, fps=options.frame_rate)
        # `check` reports what an incomplete folder lacks.
        with suppress(UserError):
            self.media = replace(self.media, max_frames=self.media.max_frames if self.starts_from_picture else 1)

    @property
    def starts_from_picture(self) -> bool:
        """Whether it is of video to world: one more channel says which frames are given."""
        return self.parts.denoiser_config["in_channels"] == self._vae_config["z_dim"] + 1

    def problems_of_parts(self) -> Iterator[Problem]:
        config, made = self.parts.denoiser_config, self._vae_config["z_dim"]
        width, read = config["text_embed_dim"], self.parts.text_config("t5")["d_model"]
        other = next((name for key, name in OTHERS.items() if config.get(key, OTHERS_BY_DEFAULT.get(key))), None)
        if other:
            yield self.parts.misfit(
                f"is of {other}, which is not trained here; give Cosmos-Predict2, of text to image or video to world"
            )
        elif config["in_channels"] not in (made, made + 1):
            yield self.parts.misfit(
                f"takes {config['in_channels']} channels, and the VAE makes {made}; text to image takes {made}, video "
                f"to world {made + 1}: give the VAE of Wan 2.1, or another model"
            )
        elif width != read:
            yield self.parts.misfit(f"takes text of {width} features and T5 makes {read}; give T5-11B, the first one")
        elif "second_frame_share" in self.options.model_fields_set and not self.starts_from_picture:
            yield Problem("", "[model] second_frame_share", "is for video to world alone; leave it out")

    def remarks(self) -> Iterator[tuple[str, str]]:
        yield from super().remarks()
        yield (
            "type",
            "NVIDIA's licence asks for its guardrail where this model is used, and samples of this run do not pass "
            "through one: whether that is allowed is yours to see to",
        )

    def problems_of_data(self, samples: Sequence[Sample]) -> list[Problem]:
        return problems_of_rates(samples, self.media.fps)

    @property
    def places(self) -> tuple[int, int]:
        config = self.parts.denoiser_config
        # One row of numbers serves all three axes.
        side = max(size // patch for size, patch in zip(config["max_size"], self._patch, strict=True))
        return side, side

    @property
    def _patch(self) -> Sequence[int]:
        return self.parts.denoiser_config.get("patch_size", (1, 2, 2))

    def encoders(self, controls: int = 0) -> list[ModelEncoder]:
        options, folder = self.options, self.options.diffusers_path
        # In training the first frame is that of the latents; this one is for samples.
        first_frame = LoneFrameAutoencoder(folder, options.vae_path, self.dtype)
        return [
            WanAutoencoder(folder, options.vae_path, self.dtype, draw=options.latents),
            self.parts.text_encoder(TrueLengthFeatures("t5", options.max_sequence_length)),
            *([first_frame] if self.starts_from_picture else []),
        ]

    def to_layers(self, denoiser: CosmosTransformer3DModel) -> list[nn.Module]:
        reads = {
            "hidden_states": "x_BTD",
            "encoder_hidden_states": "text_BLD",
            "embedded_timestep": "time",
            "temb": "modulation",
            "image_rotary_emb": "rope_TE",
        }
        middles = [Middle(block, reads, writes=("x_BTD",)) for block in denoiser.transformer_blocks]
        return [Entry(denoiser, self.media.fps), *middles, Exit(denoiser)]

    def prepare_inputs(
        self, features: Features, x_t: torch.Tensor, t_B: torch.Tensor, guidance: float | None = None
    ) -> CosmosPredict2Inputs:
        given_BC1hw, frames = None, x_t.shape[2]
        if self.starts_from_picture and "latents" not in features:
            # A sample: its given frame goes straight to the clean picture.
            first_BC1hw = features["first_frame_latents"].to(x_t)
            given_BC1hw = (x_t[:, :, :1] - first_BC1hw) / t_B.view(-1, 1, 1, 1, 1)
            whole_BCfhw = functional.pad(first_BC1hw, (0, 0, 0, 0, 0, frames - 1))
            features = {**features, "latents": whole_BCfhw, "given_frames": torch.ones(len(x_t), dtype=torch.int64)}
        x_BCfhw, t_BR = with_given_frames(features, x_t, t_B, GIVEN_TIME)
        cells_B1fhw = x_t.new_zeros(len(x_t), 1, *x_t.shape[2:])
        channels = [x_BCfhw]
        if self.starts_from_picture:
            given_B = features.get("given_frames", torch.zeros(len(x_t), dtype=torch.int64))
            channels.append(cells_B1fhw + is_given(given_B, frames)[:, None, :, None, None])
        if self.parts.denoiser_config.get("concat_padding_mask", True):
            # Nothing is padded.
            channels.append(cells_B1fhw)
        # The padding is seen, as zeros.
        text_BLD = lengthened(features["t5"], self.options.max_sequence_length)
        return CosmosPredict2Inputs(torch.cat(channels, dim=1), text_BLD, t_BR, given_BC1hw)

    def given_frames(self, latent_shape: Sequence[int], quantile: float) -> int:
        if not self.starts_from_picture:
            return 0
        return min(1 + (quantile < self.options.second_frame_share), latent_shape[-3] - 1)

    def guided(self, prompted: torch.Tensor, negative: torch.Tensor, guidance: float) -> torch.Tensor:
        """p + g (p - n), as in the stock pipeline."""
        return prompted + guidance * (prompted - negative)

    def tokens(self, latent_shape: Sequence[int]) -> int:
        *_, height, width = latent_shape
        return (height // 2) * (width // 2)

    def latent_shape(self, width: int, height: int, frames: int = 1) -> tuple[int, ...]:
        return latent_size(self._vae_config, width, height, frames)

    def scheduler(self) -> EdmSteps:
        return EdmSteps(stock_scheduler(self.options.diffusers_path, "FlowMatchEulerDiscreteScheduler"))

    # Kept, as every micro-batch asks for it.
    @cached_property
    def _vae_config(self) -> dict[str, Any]:
        return wan_vae_config(self.options.diffusers_path, self.options.vae_path)
