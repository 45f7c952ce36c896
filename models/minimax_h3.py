"""MiniMax-H3: text, sound and video in one sequence, through which blocks without any attention to the text go. Sound
is neither read nor made.

The samples of a micro-batch are parts of one sequence, one after the other, each of them its text and its video, and
attention is within each part. So texts of any lengths are beside each other without padding, and each sample has a time
of its own.

Shapes: B batch, C latent channels, f h w latent frames, height and width, U text tokens and V video tokens of all
samples, of which W are neither of key frames nor of references, P = U + V tokens of the sequence, R times, N numbers of
a token, D width, F text features, E rotary angles.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from einops import rearrange
from torch import nn

from models.base import BasePipeline, Features, ModelEncoder
from models.families.clips import problems_of_stills
from models.foundation.checkpoints.configs import stock_scheduler
from models.foundation.checkpoints.folders import TextPart, problems_of
from models.foundation.checkpoints.layouts.minimax_h3 import MINIMAX_H3_LAYOUT
from models.foundation.checkpoints.weights import CheckpointNames
from models.foundation.encoders.minimax_h3_text import (
    LAYER,
    MOST_CLIPS,
    MOST_PICTURES,
    BareStates,
    KeyFrameEncoder,
    ReferenceEncoder,
    from_comfyui,
)
from models.foundation.encoders.minimax_h3_vae import (
    MINIMAX_H3,
    MiniMaxH3Autoencoder,
    MiniMaxH3KeyFrames,
    MiniMaxH3Reference,
    cell_of,
    frame_groups,
    minimax_h3_latent_size,
    pieces_of,
)
from models.foundation.encoders.text import TextEncoder
from models.foundation.layers.chain import Middle
from models.foundation.layers.data_ward_steps import DataWardSteps
from models.foundation.layers.minimax_h3_blocks import MiniMaxH3Stream, Modulation, Refined
from models.foundation.layers.minimax_h3_layout import KINDS, OF_TEXT, PATCH, layout, tokens_of
from models.foundation.layers.parts_attention import PartsAttention
from utils.dataset.buckets import MediaFacts
from utils.dataset.encoders import Encoder
from utils.dataset.inputs import control_names
from utils.dataset.samples import Sample
from utils.diffusion.objectives import FlowMatching
from utils.errors import Problem, UserError
from utils.settings.model_schema import ModelSettings
from utils.settings.schema import SamplingSettings
from utils.settings.values import Count

if TYPE_CHECKING:
    from diffusers import MiniMaxH3Transformer3DModel

logger = logging.getLogger(__name__)

TEXT = "qwen3_vl"
GIVEN_TIME = 0.999
"""The time of key frames and references, in the model's measure, until the sample's own is later: they have a little
noise."""
REFERENCES = control_names(MOST_PICTURES + MOST_CLIPS)
OF_REFERENCES = "transformer_ref"
"""Where a diffusers folder has the transformer for references."""


class MiniMaxH3Options(ModelSettings):
    """`[model]` of `type = "minimax_h3"`.

    Inference shifts by 12 at all sizes, and takes evenly spaced noise levels before that: `shift = 12.0` with
    `timestep_sample_method = "uniform"` trains where samples are drawn. The model is distilled to need no guidance,
    which plain training undoes little by little: `folded_guidance` keeps it.
    """

    max_sequence_length: Count = 1024
    """Number of Qwen3-VL tokens of a caption that are read, beside those of key frames and references. The cache takes
    10 KB for a token."""
    from_first_frame: bool = False
    """Train clips from their first frame, and give samples a picture. The model sees it as further tokens, and its text
    encoder sees it before the caption, with the settings in the folder's `processor`."""
    to_last_frame: bool = False
    """Train clips from their first frame to their last, and give samples two pictures."""
    from_references: bool = False
    """Train the transformer for references (`transformer_ref` of the folder, or its file as `transformer_path`): the
    control images and clips of the dataset, up to nine and three, and those of samples. The model sees them as further
    tokens, and its text encoder before the caption, as `<Picture 1>`, `<Picture 2>` ... `<Video 1>` and so on."""


class MiniMaxH3Inputs(NamedTuple):
    """The inputs of the entry; those that `Layout` has too are described there. Samples have a time, or two with that
    of pictures that are given, and `time_P` is the number of the time of each token. `canvas_fhw0` has no elements: its
    shape carries the latent's."""

    x_1VN: torch.Tensor
    text_1UF: torch.Tensor
    t_R: torch.Tensor
    positions_P3: torch.Tensor
    video_V: torch.Tensor
    noisy_W: torch.Tensor
    text_U: torch.Tensor
    time_P: torch.Tensor
    kind_P: torch.Tensor
    parts: tuple[torch.Tensor, ...]
    texts: tuple[torch.Tensor, ...]
    canvas_fhw0: torch.Tensor


class Entry(nn.Module):
    """Embeds tokens, text, time and positions. Each stage makes the rotary tables itself."""

    remakes = ("rope_PE",)

    def __init__(self, denoiser: MiniMaxH3Transformer3DModel):
        super().__init__()
        self.rope = denoiser.rope
        self.proj_in, self.context_embedder = denoiser.proj_in, denoiser.context_embedder
        # Nothing goes through it; it is trained as little as in the stock module without sound.
        self.audio_proj_in = denoiser.audio_proj_in
        self.time_proj, self.time_embedder = denoiser.time_proj, denoiser.time_embedder

    def forward(self, inputs: MiniMaxH3Inputs) -> MiniMaxH3Stream:
        dtype, time = self.context_embedder.weight.dtype, self.time_embedder
        x_1VD = self.proj_in(inputs.x_1VN.to(self.proj_in.weight.dtype)).to(dtype)
        sequence_1PD = x_1VD.new_zeros(1, len(inputs.time_P), x_1VD.shape[2])
        return MiniMaxH3Stream(
            x_1PD=sequence_1PD.index_copy(1, inputs.video_V, x_1VD),
            text_1UD=self.context_embedder(inputs.text_1UF.to(dtype)),
            text_U=inputs.text_U,
            texts=inputs.texts,
            time_RD=time(self.time_proj(inputs.t_R).to(time.linear_1.weight.dtype)),
            modulation_P=inputs.time_P * KINDS + inputs.kind_P,
            time_P=inputs.time_P,
            positions_P3=inputs.positions_P3,
            rope_PE=self.rope(inputs.positions_P3),
            noisy_W=inputs.noisy_W,
            parts=inputs.parts,
            canvas_fhw0=inputs.canvas_fhw0,
        )

    def remake(self, stream: MiniMaxH3Stream) -> dict[str, Any]:
        """The fields that are not sent from stage to stage."""
        # Its frequencies are where the entry was built.
        return {"rope_PE": self.rope.to(stream.x_1PD.device)(stream.positions_P3)}


class Exit(nn.Module):
    """Projects the video tokens to the latent (B, C, f, h, w)."""

    def __init__(self, denoiser: MiniMaxH3Transformer3DModel):
        super().__init__()
        self.norm_out, self.proj_out = denoiser.norm_out, denoiser.proj_out
        # As that of the entry.
        self.audio_proj_out = denoiser.audio_proj_out

    def forward(self, stream: MiniMaxH3Stream) -> torch.Tensor:
        x_1PD = self.norm_out(stream.x_1PD, stream.time_RD, stream.time_P).to(self.proj_out.weight.dtype)
        frames, height, width, _ = stream.canvas_fhw0.shape
        return rearrange(
            self.proj_out(x_1PD).index_select(1, stream.noisy_W).to(stream.x_1PD.dtype),
            "1 (b f h w) (c p q) -> b c f (h p) (w q)",
            f=frames,
            h=height // PATCH,
            w=width // PATCH,
            p=PATCH,
            q=PATCH,
        )


class MiniMaxH3Pipeline(BasePipeline):
    """MiniMax-H3: text to video, and video from key frames, of the transformer for these (`transformer`), or video from
    reference pictures and clips, of that for references (`transformer_ref`, which has the same tensors). Sound is
    neither read, of references neither, nor made, as the stock module has it for a sequence without sound; an export
    makes video with sound as the base does. References have the size that the dataset gives them, see
    `control_resolution` (inference brings the shorter side of a picture to 2048 pixels, whatever the clip's, and clips
    to about 768 x 1344). Reference clips begin with their file, and are no longer than the sample's; estimates of
    memory count them as pictures. Pictures are trained as clips of one frame, and drawn by a decoder that was made for
    clips, so that samples of one frame look worse than what the model knows. As in inference, `steps` of `[sampling]`
    are one more than there are predictions. Of single files Comfy-Org's are read; files of MiniMax's own with the
    publisher's names have the rows of queries, keys and values in another order, which no file tells, and must not be
    given."""

    Options = MiniMaxH3Options
    denoiser_class = "MiniMaxH3Transformer3DModel"
    config_keys = ("in_channels", "num_refiner_layers", "patch_size", "text_dim")
    text_parts = (TextPart(TEXT, "Qwen3VLModel", names=CheckpointNames(convert=from_comfyui), vision=("visual.",)),)
    media = MediaFacts(spatial=32, temporal=17, max_frames=345, fps=24.0, further=5)
    objective = FlowMatching(predicts_data_minus_noise=True, time_is_cleanness=True)
    blocks = ("token_refiner.refiner_blocks", "transformer_blocks")
    stream_type = MiniMaxH3Stream
    keep_in_high_precision = ("proj_in.", "proj_out.", "time_embedder.")
    original_layout = MINIMAX_H3_LAYOUT
    scheduler_sets_levels = True
    guided_by_second_prediction = True

    def __init__(self, options: MiniMaxH3Options, seed: int = 0):
        super().__init__(options, seed)
        self.media = replace(self.media, control_clips=options.from_references)
        # `check` reports what an incomplete folder lacks.
        with suppress(UserError):
            piece, further = pieces_of(self._vae_config)
            spatial = PATCH * cell_of(self._vae_config)
            self.media = replace(self.media, spatial=spatial, temporal=piece, further=further)

    @property
    def denoiser_folder(self) -> str:
        return OF_REFERENCES if self.options.from_references else "transformer"

    @property
    def max_controls(self) -> int:
        return len(REFERENCES) if self.options.from_references else 0

    def problems_of_parts(self) -> Iterator[Problem]:
        if self.options.from_references and self.starts_from_picture:
            message = "key frames and references are for two transformers; set one of them alone"
            yield Problem("", "[model] from_references", message)
        elif self.options.from_references:
            yield from problems_of([self._text_encoder(1).check])
        config, made = self.parts.denoiser_config, self._vae_config["latent_channels"]
        text = self.encoders()[1].config().get_text_config()
        if config["in_channels"] != made:
            yield self.parts.misfit(
                f"takes latents of {config['in_channels']} channels and the VAE makes {made}; give MiniMax-H3's own VAE"
            )
        if list(config["patch_size"]) != [1, PATCH, PATCH]:
            yield self.parts.misfit(
                f"has `patch_size` {config['patch_size']}, and MiniMax-H3 has [1, {PATCH}, {PATCH}]; download it again"
            )
        if not config["num_refiner_layers"]:
            yield self.parts.misfit("has no `num_refiner_layers`, and MiniMax-H3 has two; download it again")
        if config["text_dim"] != text.hidden_size or text.num_hidden_layers <= LAYER:
            yield self.parts.misfit(
                f"takes text of {config['text_dim']} features behind layer {LAYER} of its text encoder, and that has "
                f"{text.num_hidden_layers} layers of {text.hidden_size}; give Qwen3-VL 32B"
            )

    def problems_of_samples(self, sampling: SamplingSettings) -> Iterator[Problem]:
        if sampling.prompts and "guidance" not in sampling.model_fields_set:
            message = (
                f"is {sampling.guidance:g} where it is not given, and this model is distilled to need none; set it to "
                "1.0, or to more for a model that has lost its distillation"
            )
            yield Problem("", "[sampling] guidance", message)

    @property
    def starts_from_picture(self) -> bool:
        return self.options.from_first_frame or self.options.to_last_frame

    @property
    def ends_in_picture(self) -> bool:
        return self.options.to_last_frame

    def problems_of_data(self, samples: Sequence[Sample]) -> list[Problem]:
        if self.starts_from_picture:
            return problems_of_stills(samples)
        if not self.options.from_references:
            return []
        still = [
            control.media.locator
            for sample in samples
            for control in sample.controls
            if control.bucket.frames == 1 < control.media.frames
        ]
        if still:
            logger.warning(
                "%d reference clips are pictures here, of their first frame, since they or their samples have fewer "
                "than %d frames: the first is %s",
                len(still),
                self.media.temporal + self.media.further,
                still[0],
            )
        by_size = {tuple(control.bucket for control in sample.controls): sample for sample in samples}
        encoder = self._text_encoder(1)
        told = (encoder.misfit(sample.controls, "control_resolution") for sample in by_size.values())
        return [Problem("", "[[directory]]", one) for one in told if one][:1]

    def misfit_of_prompt(self, prompt: Sample) -> str | None:
        if not (self.options.from_references and prompt.controls):
            return None
        return self._text_encoder(1).misfit(prompt.controls, "width and height")

    def encoders_for(self, controls: int) -> list[Encoder]:
        if controls and not self.options.from_references:
            raise UserError.of(
                "control images are references here, for which there is another transformer: set [model] "
                "from_references = true, or leave control_path out",
                where="[[directory]]",
            )
        if self.options.from_references and not controls:
            logger.warning(
                "the transformer for references is trained to make clips of text alone: no [[directory]] has a "
                "control_path with references"
            )
        return super().encoders_for(controls)

    def encoders(self, controls: int = 0) -> list[ModelEncoder]:
        options = self.options
        vae = options.diffusers_path, options.vae_path, self.dtype
        made = [MiniMaxH3Autoencoder(*vae, draw=options.latents), self._text_encoder(controls)]
        if self.starts_from_picture:
            return [*made, MiniMaxH3KeyFrames(*vae, to_last=self.ends_in_picture)]
        return [*made, *(MiniMaxH3Reference(*vae, reads=name) for name in REFERENCES[:controls])]

    def _text_encoder(self, controls: int) -> TextEncoder:
        """The text encoder for captions, with key frames or with this many references."""
        features = BareStates(TEXT, self.options.max_sequence_length)
        if self.starts_from_picture:
            return self.parts.text_encoder(features, KeyFrameEncoder, to_last=self.ends_in_picture)
        if controls:
            return self.parts.text_encoder(features, ReferenceEncoder, controls=controls)
        return self.parts.text_encoder(features)

    def build_denoiser(self) -> MiniMaxH3Transformer3DModel:
        denoiser = super().build_denoiser()
        for module in denoiser.modules():
            if hasattr(module, "set_processor"):
                module.set_processor(PartsAttention(module.processor))
        for block in denoiser.transformer_blocks:
            block.adaln_proj = Modulation(block.adaln_proj)
        return denoiser

    def to_layers(self, denoiser: MiniMaxH3Transformer3DModel) -> list[nn.Module]:
        reads = {
            "hidden_states": "x_1PD",
            "temb": "time_RD",
            "adaln_indices": "modulation_P",
            "rotary_emb": "places",
        }
        *first, last = denoiser.token_refiner.refiner_blocks
        refined = [*(Refined(block, None) for block in first), Refined(last, denoiser.token_refiner.final_norm)]
        middles = [Middle(block, reads, writes=("x_1PD",)) for block in denoiser.transformer_blocks]
        return [Entry(denoiser), *refined, *middles, Exit(denoiser)]

    def prepare_inputs(
        self, features: Features, x_t: torch.Tensor, t_B: torch.Tensor, guidance: float | None = None
    ) -> MiniMaxH3Inputs:
        mask_BL = features[f"{TEXT}_mask"].bool()
        kinds_BL = features.get(f"{TEXT}_kinds", torch.full(mask_BL.shape, OF_TEXT))
        kinds = [kind_L[mask_L] for kind_L, mask_L in zip(kinds_BL, mask_BL, strict=True)]
        keys = [features["key_frame_latents"].to(x_t)] if self.starts_from_picture else []
        references = [features[f"{name}_latents"].to(x_t) for name in REFERENCES if f"{name}_latents" in features]
        shapes = [reference.shape[2:] for reference in references]
        placed = layout(kinds, x_t.shape[2:], sum(one.shape[2] for one in keys), shapes)
        times = [self.objective.model_time(t_B)]
        if keys or references:
            times.append(times[0].clamp(min=GIVEN_TIME))
        return MiniMaxH3Inputs(
            x_1VN=tokens_of([*keys, *references, x_t]),
            text_1UF=features[TEXT][mask_BL].unsqueeze(0),
            t_R=torch.stack(times, dim=1).flatten(),
            positions_P3=placed.positions_P3,
            video_V=placed.video_V,
            noisy_W=placed.noisy_W,
            text_U=placed.text_U,
            time_P=len(times) * placed.sample_P + placed.is_given_P,
            kind_P=placed.kind_P,
            parts=placed.parts,
            texts=placed.texts,
            canvas_fhw0=torch.empty(*x_t.shape[2:], 0),
        )

    def tokens(self, latent_shape: Sequence[int]) -> int:
        *_, height, width = latent_shape
        return (height // PATCH) * (width // PATCH)

    def latent_shape(self, width: int, height: int, frames: int = 1) -> tuple[int, ...]:
        return minimax_h3_latent_size(self._vae_config, width, height, frames)

    def frame_groups(self, frames: int) -> list[int]:
        return frame_groups(self._vae_config, frames)

    def scheduler(self) -> DataWardSteps:
        return DataWardSteps(stock_scheduler(self.options.diffusers_path, "MiniMaxH3Scheduler"))

    # Kept, as every micro-batch asks for it.
    @cached_property
    def _vae_config(self) -> dict[str, Any]:
        return MINIMAX_H3.config(self.options.diffusers_path, self.options.vae_path)
