"""Wan 2.1 and 2.2: one chain of blocks over latent patches that attend to the text.

It covers both sizes of 2.1, each of the two experts of 2.2 A14B, and TI2V-5B. Models of text to video are trained on
pictures and clips together; models of picture to video (i2v) receive the first frame as further channels and, in 2.1,
through CLIP, and that of first and last frames (FLF2V) both frames.

Shapes: B batch, C latent channels, f h w latent frames, height and width, T video tokens, L text tokens (those of CLIP
before them), R rows of time, D width of the transformer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import torch
from einops import rearrange
from torch import nn
from torch.nn import functional

from models.base import BasePipeline, Features, ModelEncoder
from models.families.clips import SeesFrames, problems_of_image_encoder, problems_of_stills
from models.foundation.checkpoints.configs import stock_scheduler
from models.foundation.checkpoints.folders import TextPart, model_index
from models.foundation.checkpoints.layouts.wan import WAN_LAYOUT
from models.foundation.encoders.first_frame import ClipVision, FirstFrameAutoencoder, given_frames
from models.foundation.encoders.text_features import TrueLengthFeatures
from models.foundation.encoders.video_vae import WanAutoencoder, latent_size, wan_vae_config
from models.foundation.layers.chain import Middle
from models.foundation.layers.given import row_of_token, with_given_frames
from models.foundation.layers.patches import blank_latent
from utils.dataset.buckets import MediaFacts
from utils.dataset.samples import Sample
from utils.errors import Problem, UserError
from utils.settings.model_schema import ModelSettings
from utils.settings.values import Count

if TYPE_CHECKING:
    from diffusers import UniPCMultistepScheduler, WanTransformer3DModel

BLIND_TOKENS = 512
"""Number of text tokens in models that see the first frame through CLIP: their blocks treat all tokens before these as
CLIP's."""
EXPERT_FOLDERS = {"high": "transformer", "low": "transformer_2"}
EXPERT_LIMITS = {"high": "min_t", "low": "max_t"}
"""The option that keeps an expert to the noise levels at which it is used."""
TRAIN_STEPS = 1000
PATCH = 2
FPS_5B = 24.0
"""Frames per second of TI2V-5B (`sample_fps` of its publisher's configuration)."""


class WanOptions(SeesFrames):
    """`[model]` of `type = "wan"`."""

    tells_apart: ClassVar[tuple[str, ...]] = (*ModelSettings.tells_apart, "expert")

    expert: Literal["high", "low"] = "high"
    """Which expert of Wan 2.2 A14B is trained: the one for much noise or the one for little. Each is trained at the
    noise levels at which it is used: from the folder's `boundary_ratio` up or down to it, unless `min_t` or `max_t` is
    given. Wan 2.1 has a single model, which is in the folder of the high one."""
    max_sequence_length: Count = 512
    """Number of UMT5 tokens that the model sees, including padding."""
    from_first_frame: bool = False
    """Train TI2V-5B on clips from their first frame, which the model receives without noise and does not have to
    predict; pictures are still trained from text."""
    to_last_frame: bool = False
    """Train picture to video of Wan 2.2 A14B on clips from their first frame to their last, and give samples two
    pictures. The model of Wan 2.1 for a first and a last frame (FLF2V) always is trained so."""


class WanInputs(NamedTuple):
    """The inputs of the entry. `text_BLD` is only padded to the longest caption of the batch. Time has a row for each
    frame if some are given."""

    x_BCfhw: torch.Tensor
    text_BLD: torch.Tensor
    t_BR: torch.Tensor
    first_frame_BLD: torch.Tensor | None


class WanStream(NamedTuple):
    """What travels from layer to layer. `canvas_fhw0` has no elements: its shape carries the tokens' grid. With rows
    of time for the frames, `row_T` has the row of each token: each layer looks up the modulations, since those of all
    tokens would take a gigabyte."""

    x_BTD: torch.Tensor
    text_BLD: torch.Tensor
    modulation_BR6D: torch.Tensor
    time_BRD: torch.Tensor
    row_T: torch.Tensor | None
    rope_1T1D: tuple[torch.Tensor, torch.Tensor]
    canvas_fhw0: torch.Tensor

    @property
    def modulation(self) -> torch.Tensor:
        """The modulation for a block: (B, 6, D), or (B, T, 6, D)."""
        return self.modulation_BR6D[:, 0] if self.row_T is None else self.modulation_BR6D[:, self.row_T]


class Entry(nn.Module):
    """Embeds patches, text, time and positions. Each stage makes the rotary tables itself."""

    remakes = ("rope_1T1D",)

    def __init__(self, denoiser: WanTransformer3DModel, text_tokens: int):
        super().__init__()
        self.rope = denoiser.rope
        self.patch = tuple(denoiser.config.patch_size)
        self.patch_embedding = denoiser.patch_embedding
        self.condition_embedder = denoiser.condition_embedder
        self.text_tokens = text_tokens
        # A model with places for the tokens of two pictures takes these as if they were of two samples.
        self.sees_last = denoiser.config.pos_embed_seq_len is not None

    def forward(self, inputs: WanInputs) -> WanStream:
        weight = self.patch_embedding.weight
        x_BCfhw = inputs.x_BCfhw.to(weight.dtype)
        text_BLD = functional.pad(inputs.text_BLD, (0, 0, 0, self.text_tokens - inputs.text_BLD.shape[1]))
        first_frame_BLD = inputs.first_frame_BLD
        if first_frame_BLD is not None:
            first_frame_BLD = first_frame_BLD.to(weight.dtype)
            if self.sees_last:
                first_frame_BLD = rearrange(first_frame_BLD, "b (n l) d -> (b n) l d", n=2)
        # The time stays float32 until it is embedded.
        time_ED, modulation_EM, text_BLD, first_frame_BLD = self.condition_embedder(
            inputs.t_BR.flatten() * TRAIN_STEPS, text_BLD.to(weight.dtype), first_frame_BLD
        )
        if first_frame_BLD is not None:
            text_BLD = torch.cat([first_frame_BLD, text_BLD], dim=1)
        patches_BDfhw = self.patch_embedding(x_BCfhw)
        x_BTD = rearrange(patches_BDfhw, "b d f h w -> b (f h w) d").contiguous()
        rows = inputs.t_BR.shape[1]
        return WanStream(
            x_BTD=x_BTD,
            text_BLD=text_BLD,
            modulation_BR6D=rearrange(modulation_EM, "(b r) (m d) -> b r m d", r=rows, m=6),
            time_BRD=rearrange(time_ED, "(b r) d -> b r d", r=rows),
            row_T=row_of_token(rows, patches_BDfhw[0, 0, 0].numel(), weight.device),
            rope_1T1D=self.rope(x_BCfhw),
            canvas_fhw0=torch.empty(*patches_BDfhw.shape[2:], 0, device=weight.device),
        )

    def remake(self, stream: WanStream) -> dict[str, Any]:
        """The fields that are not sent from stage to stage."""
        latent = blank_latent(stream.canvas_fhw0, self.patch)
        # Its tables are where the entry was built.
        return {"rope_1T1D": self.rope.to(latent.device)(latent)}


class Exit(nn.Module):
    """Projects the tokens to the latent (B, C, f, h, w)."""

    def __init__(self, denoiser: WanTransformer3DModel):
        super().__init__()
        self.norm_out = denoiser.norm_out
        self.proj_out = denoiser.proj_out
        self.scale_shift_table = denoiser.scale_shift_table
        self.patch = tuple(denoiser.config.patch_size)

    def forward(self, stream: WanStream) -> torch.Tensor:
        # One time for all tokens, or one for each.
        time_BTD = stream.time_BRD if stream.row_T is None else stream.time_BRD[:, stream.row_T]
        shift_BTD, scale_BTD = (self.scale_shift_table.unsqueeze(1) + time_BTD.unsqueeze(2)).unbind(dim=2)
        x_BTD = (self.norm_out(stream.x_BTD.float()) * (1 + scale_BTD) + shift_BTD).type_as(stream.x_BTD)
        frames, height, width, _ = stream.canvas_fhw0.shape
        return rearrange(
            self.proj_out(x_BTD),
            "b (f h w) (p q r c) -> b c (f p) (h q) (w r)",
            **dict(zip("fhwpqr", (frames, height, width, *self.patch), strict=True)),
        )


def boundary_of(options: WanOptions) -> float | None:
    """The noise level from which on the expert for much noise is used, and below which the other; None for a folder
    that does not say so, as those of models without experts."""
    ratio = model_index(options.diffusers_path).get("boundary_ratio") if options.diffusers_path else None
    return float(ratio) if ratio and 0 < ratio < 1 else None


def within_expert(options: WanOptions) -> WanOptions:
    """The options with the limit of the expert's noise levels, if they leave it open."""
    limit = EXPERT_LIMITS[options.expert]
    # `check` reports a damaged index.
    with suppress(UserError):
        boundary = boundary_of(options)
        if boundary is not None and limit not in options.model_fields_set:
            limited = options.model_copy(update={limit: boundary})
            # A limit that is given on the other side may leave nothing of the range: it is meant.
            return limited if limited.min_t < limited.max_t else options
    return options


@dataclass(frozen=True)
class CleanedFeatures(TrueLengthFeatures):
    """`TrueLengthFeatures` of the caption after the cleaning of Wan's pipeline: no HTML entities, single spaces,
    repaired Unicode."""

    def __call__(self, text_encoder: nn.Module, tokenizer: Any, captions: list[str]) -> dict[str, list[torch.Tensor]]:
        from diffusers.pipelines.wan.pipeline_wan import prompt_clean

        return super().__call__(text_encoder, tokenizer, [prompt_clean(caption) for caption in captions])


class WanPipeline(BasePipeline):
    """Wan of Alibaba: text to video, and picture to video, from a first frame or from a first to a last one."""

    Options = WanOptions
    denoiser_class = "WanTransformer3DModel"
    config_keys = ("in_channels",)
    text_parts = (TextPart("umt5", "UMT5EncoderModel"),)
    scheduler_sets_levels = True
    media = MediaFacts(spatial=16, temporal=4, max_frames=241, fps=16.0)
    blocks = ("blocks",)
    stream_type = WanStream
    original_layout = WAN_LAYOUT
    guided_by_second_prediction = True
    noise_in_float32 = True
    keep_in_high_precision = ("time_embedder", "scale_shift_table", "norm1", "norm2")

    def __init__(self, options: WanOptions, seed: int = 0):
        super().__init__(within_expert(options), seed)
        # `check` reports what an incomplete folder lacks.
        with suppress(UserError):
            cell = self._vae_config.get("scale_factor_spatial", self.media.spatial // PATCH)
            self.media = replace(self.media, spatial=PATCH * cell, fps=FPS_5B if self._is_5b else self.media.fps)

    @property
    def _is_5b(self) -> bool:
        """Whether it is TI2V-5B, whose VAE first turns pixels into patches."""
        return bool(self._vae_config.get("patch_size"))

    @property
    def starts_from_picture(self) -> bool:
        """Whether the model takes the first frame as further channels."""
        return self.parts.denoiser_config["in_channels"] != self._vae_config["z_dim"]

    @property
    def _sees_first_frame(self) -> bool:
        """Whether it also sees the first frame through CLIP."""
        return self.parts.denoiser_config.get("image_dim") is not None

    @property
    def ends_in_picture(self) -> bool:
        return self.options.to_last_frame or self._sees_last_frame

    @property
    def _sees_last_frame(self) -> bool:
        """Whether it sees the last frame too through CLIP."""
        return self.parts.denoiser_config.get("pos_embed_seq_len") is not None

    @property
    def _clip_tokens(self) -> int:
        """The number of tokens that CLIP makes of what it sees."""
        return self._clip().tokens

    def _clip(self) -> ClipVision:
        options = self.options
        return ClipVision(options.diffusers_path, options.image_encoder_path, self.dtype, to_last=self.ends_in_picture)

    @property
    def denoiser_folder(self) -> str:
        return EXPERT_FOLDERS[self.options.expert]

    def check_folder(self) -> None:
        folder = self.options.diffusers_path / self.denoiser_folder
        if self.options.expert == "low" and not folder.is_dir():
            raise UserError.of(
                f"there is no {folder}: Wan 2.2 A14B alone has two experts; leave it out, or download that folder",
                where="[model] expert",
            )
        super().check_folder()

    def remarks(self) -> Iterator[tuple[str, str]]:
        yield from super().remarks()
        options, boundary = self.options, boundary_of(self.options)
        trained = f"the {options.expert} expert is trained at noise levels from {options.min_t:g} to {options.max_t:g}"
        if boundary is not None:
            used = (boundary, 1.0) if options.expert == "high" else (0.0, boundary)
            is_inside = used[0] <= options.min_t and options.max_t <= used[1]
            beyond = "" if is_inside else ": beyond that range the other expert is used, and this one trained in vain"
            note = f"{trained}; by the folder's boundary_ratio it is used from {used[0]:g} to {used[1]:g}{beyond}"
            yield EXPERT_LIMITS[options.expert], note
        elif (options.diffusers_path / EXPERT_FOLDERS["low"]).is_dir():
            yield (
                EXPERT_LIMITS[options.expert],
                f"{trained}; from where to where it is used is not known, since model_index.json has no "
                "boundary_ratio (0.875 in text to video, 0.9 in picture to video)",
            )

    def problems_of_parts(self) -> Iterator[Problem]:
        channels, made, options = self.parts.denoiser_config["in_channels"], self._vae_config["z_dim"], self.options
        yield from problems_of_image_encoder(options, sees=self._sees_first_frame)
        if channels not in (made, 2 * made + self.media.temporal):
            yield self.parts.misfit(
                f"takes {channels} channels, and the VAE makes {made}; text to video takes {made}, picture to video "
                f"{2 * made + self.media.temporal}: give the model's own VAE, or another model"
            )
        if self._sees_last_frame and not (self._sees_first_frame and self.starts_from_picture):
            yield self.parts.misfit(
                "has `pos_embed_seq_len`, as Wan 2.1 for a first and a last frame (FLF2V), but not the channels and "
                "`image_dim` for these; download it again"
            )
        elif self._sees_last_frame and self.parts.denoiser_config["pos_embed_seq_len"] != self._clip_tokens:
            yield self.parts.misfit(
                f"has places for {self.parts.denoiser_config['pos_embed_seq_len']} tokens of two pictures, and the "
                f"image_encoder beside it makes {self._clip_tokens}; give the model's own"
            )
        if options.to_last_frame and (self._sees_first_frame or not self.starts_from_picture):
            known = "always goes" if self._sees_last_frame else "does not go"
            message = f"is for picture to video of Wan 2.2 A14B; this model {known} to a last frame: leave it out"
            yield Problem("", "[model] to_last_frame", message)
        if self._sees_first_frame and options.max_sequence_length != BLIND_TOKENS:
            message = f"must be {BLIND_TOKENS} for a model that sees the first frame by CLIP; leave it out"
            yield Problem("", "[model] max_sequence_length", message)
        if options.from_first_frame and not self._is_5b:
            message = (
                "is for TI2V-5B alone: models of picture to video always take the first frame, the others never; leave "
                "it out"
            )
            yield Problem("", "[model] from_first_frame", message)

    def problems_of_data(self, samples: Sequence[Sample]) -> list[Problem]:
        return problems_of_stills(samples) if self.starts_from_picture else []

    @property
    def places(self) -> tuple[int, int]:
        side = self.parts.denoiser_config.get("rope_max_seq_len", 1024)
        return side, side

    def encoders(self, controls: int = 0) -> list[ModelEncoder]:
        options, folder = self.options, self.options.diffusers_path
        first_frame = FirstFrameAutoencoder(folder, options.vae_path, self.dtype, to_last=self.ends_in_picture)
        return [
            WanAutoencoder(folder, options.vae_path, self.dtype, draw=options.latents),
            self.parts.text_encoder(CleanedFeatures("umt5", options.max_sequence_length)),
            *([first_frame] if self.starts_from_picture else []),
            *([self._clip()] if self._sees_first_frame else []),
        ]

    def to_layers(self, denoiser: WanTransformer3DModel) -> list[nn.Module]:
        reads = {
            "hidden_states": "x_BTD",
            "encoder_hidden_states": "text_BLD",
            "temb": "modulation",
            "rotary_emb": "rope_1T1D",
        }
        middles = [Middle(block, reads, writes=("x_BTD",)) for block in denoiser.blocks]
        return [Entry(denoiser, self.options.max_sequence_length), *middles, Exit(denoiser)]

    def prepare_inputs(
        self, features: Features, x_t: torch.Tensor, t_B: torch.Tensor, guidance: float | None = None
    ) -> WanInputs:
        x_t, t_BR = with_given_frames(features, x_t, t_B)
        if self.starts_from_picture:
            condition = features["first_frame_latents"].to(x_t)
            mask = given_frames(condition, self.media.temporal, to_last=self.ends_in_picture)
            x_t = torch.cat([x_t, mask, condition], dim=1)
        return WanInputs(x_t, features["umt5"], t_BR, features.get("clip_vision"))

    def given_frames(self, latent_shape: Sequence[int], quantile: float) -> int:
        return int(self.options.from_first_frame and latent_shape[-3] > 1)

    def tokens(self, latent_shape: Sequence[int]) -> int:
        *_, height, width = latent_shape
        return (height // 2) * (width // 2)

    def latent_shape(self, width: int, height: int, frames: int = 1) -> tuple[int, ...]:
        return latent_size(self._vae_config, width, height, frames)

    def scheduler(self) -> UniPCMultistepScheduler:
        return stock_scheduler(self.options.diffusers_path, "UniPCMultistepScheduler")

    # Kept, as every micro-batch asks for it.
    @cached_property
    def _vae_config(self) -> dict[str, Any]:
        return wan_vae_config(self.options.diffusers_path, self.options.vae_path)
