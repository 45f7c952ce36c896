"""CogVideoX 1.0 and 1.5: one chain of blocks over text and clip, which see each other, with DDPM's steps.

Positions are sines and cosines that are added to the tokens (2B), rotary (5B), or both rotary and a learned table (5B
of picture to video). 1.5 takes two latent frames together: a copy of the first one comes before a clip's latents, which
are of an odd number, and samples are drawn with such a frame and decoded without. Models of picture to video have the
latent of the picture as further channels of the first frame, and zeros for the others.

Shapes: B batch, C latent channels, f h w latent frames, height and width, T video tokens, L text tokens, D width of the
transformer (of the time: its own), E features of an attention head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from einops import rearrange
from torch import nn

from models.base import BasePipeline, Features, ModelEncoder
from models.families.clips import problems_of_stills
from models.families.ddpm import DDPMOptions, ddpm_objective, ddpm_scheduler, scheduler_config
from models.foundation.checkpoints.configs import SCHEDULER_FILE
from models.foundation.checkpoints.folders import TextPart, model_index
from models.foundation.checkpoints.layouts.cogvideox import COGVIDEOX_LAYOUT
from models.foundation.encoders.cogvideox_vae import (
    COGVIDEOX,
    CogVideoXAutoencoder,
    CogVideoXFirstFrame,
    cogvideox_latent_size,
    compression_of,
)
from models.foundation.encoders.text_features import T5Features
from models.foundation.layers.chain import Middle
from models.foundation.layers.cogvideox_steps import CogVideoXDPMSteps
from utils.dataset.buckets import MediaFacts
from utils.dataset.samples import Sample
from utils.diffusion.objectives import Epsilon
from utils.errors import Problem, UserError
from utils.settings.run_tables import SamplingSettings

if TYPE_CHECKING:
    from diffusers import CogVideoXTransformer3DModel

Rope = tuple[torch.Tensor, torch.Tensor]
DDIM, DPM = "CogVideoXDDIMScheduler", "CogVideoXDPMScheduler"
CONTROLLED = "CogVideoXFunControlPipeline"
LEARNED_POSITIONS = "use_learned_positional_embeddings"
PATCH = 2
SIZE, FRAMES = (90, 60), 49
"""Width and height in latent cells, and frames, that configurations leave out."""
OFS = 2.0
"""What the model is told beside the time, if it is told something (`ofs_embed_dim`): always the same."""
LATENTS_A_PART = 2
"""The VAE goes through a clip in parts that become so many latent frames."""


class CogVideoXOptions(DDPMOptions):
    """`[model]` of `type = "cogvideox"`."""

    noised_picture: bool = True
    """Whether models of picture to video are trained with a little noise on the first frame that they are given, as
    their publisher trains them, so that they do not rely on each of its pixels: always the same for a frame, with a
    strength of e^-3 in the middle of a log-normal distribution, where colours lie between -1 and 1. Samples are drawn
    of pictures without it."""


class CogVideoXInputs(NamedTuple):
    """The inputs of the entry; `x_BfChw` has the channels of the picture too."""

    x_BfChw: torch.Tensor
    text_BLD: torch.Tensor
    step_B: torch.Tensor


class CogVideoXStream(NamedTuple):
    """What travels from layer to layer. `canvas_fhw0` has no elements: its shape carries the tokens' grid."""

    x_BTD: torch.Tensor
    text_BLD: torch.Tensor
    time_BD: torch.Tensor
    rope_TE: Rope | None
    canvas_fhw0: torch.Tensor


class Entry(nn.Module):
    """Embeds patches, text and time. Each stage makes the rotary tables itself.

    Args:
        rope: (frames, rows and columns of tokens, device) -> rotary tables; None for a model without.
    """

    remakes = ("rope_TE",)

    def __init__(self, denoiser: CogVideoXTransformer3DModel, rope: Callable[..., Rope] | None):
        super().__init__()
        self.patch_embed, self.embedding_dropout = denoiser.patch_embed, denoiser.embedding_dropout
        self.time_proj, self.time_embedding = denoiser.time_proj, denoiser.time_embedding
        self.ofs_proj, self.ofs_embedding = denoiser.ofs_proj, denoiser.ofs_embedding
        self.patch = (denoiser.config.patch_size_t or 1, denoiser.config.patch_size, denoiser.config.patch_size)
        self.rope = rope

    def forward(self, inputs: CogVideoXInputs) -> CogVideoXStream:
        dtype, device = self.patch_embed.text_proj.weight.dtype, inputs.x_BfChw.device
        frames, _, height, width = inputs.x_BfChw.shape[1:]
        grid = [side // patch for side, patch in zip((frames, height, width), self.patch, strict=True)]
        joined = self.embedding_dropout(self.patch_embed(inputs.text_BLD.to(dtype), inputs.x_BfChw.to(dtype)))
        text_tokens = inputs.text_BLD.shape[1]
        return CogVideoXStream(
            x_BTD=joined[:, text_tokens:],
            text_BLD=joined[:, :text_tokens],
            time_BD=self._time(inputs.step_B, dtype),
            rope_TE=None if self.rope is None else self.rope(*grid, device),
            canvas_fhw0=torch.empty(*grid, 0, device=device),
        )

    def remake(self, stream: CogVideoXStream) -> dict[str, Any]:
        """The fields that are not sent from stage to stage."""
        *grid, _ = stream.canvas_fhw0.shape
        return {"rope_TE": None if self.rope is None else self.rope(*grid, stream.x_BTD.device)}

    def _time(self, step_B: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        time_BD = self.time_embedding(self.time_proj(step_B).to(dtype))
        if self.ofs_embedding is None:
            return time_BD
        ofs = torch.full((1,), OFS, device=step_B.device)
        return time_BD + self.ofs_embedding(self.ofs_proj(ofs).to(dtype))


class Exit(nn.Module):
    """Projects the video tokens to the latent (B, C, f, h, w)."""

    def __init__(self, denoiser: CogVideoXTransformer3DModel):
        super().__init__()
        self.norm_final, self.norm_out, self.proj_out = denoiser.norm_final, denoiser.norm_out, denoiser.proj_out
        self.patch = (denoiser.config.patch_size_t or 1, denoiser.config.patch_size, denoiser.config.patch_size)

    def forward(self, stream: CogVideoXStream) -> torch.Tensor:
        x_BTC = self.proj_out(self.norm_out(self.norm_final(stream.x_BTD), temb=stream.time_BD))
        frames, height, width, _ = stream.canvas_fhw0.shape
        return rearrange(
            x_BTC,
            "b (f h w) (c p q r) -> b c (f p) (h q) (w r)",
            **dict(zip("fhwpqr", (frames, height, width, *self.patch), strict=True)),
        ).contiguous()


class CogVideoXPipeline(BasePipeline):
    """CogVideoX 2B and 5B, CogVideoX 1.5 5B, and those of picture to video. The 5B of picture to video has a learned
    table of positions, which a full fine-tune trains, for clips of 720 x 480 and 49 frames alone. CogVideoX-Fun, which
    is controlled or fills in, is not trained. In stock inference of picture to video a sample's seed also draws from
    the distribution of the picture's latents, of which samples here have the mode."""

    Options = CogVideoXOptions
    denoiser_class = "CogVideoXTransformer3DModel"
    config_keys = ("in_channels", "out_channels", "text_embed_dim")
    text_parts = (TextPart("t5", "T5EncoderModel"),)
    media = MediaFacts(spatial=16, temporal=8, max_frames=161, fps=16.0)
    scheduler_sets_levels = True
    blocks = ("transformer_blocks",)
    stream_type = CogVideoXStream
    original_layout = COGVIDEOX_LAYOUT
    guided_by_second_prediction = True
    comfyui_note = (
        "versions of ComfyUI without a CogVideoX of their own need an extension for it; these read the file with "
        "diffusers' names"
    )

    def __init__(self, options: CogVideoXOptions, seed: int = 0):
        super().__init__(options, seed)
        # `check` reports what an incomplete folder lacks.
        with suppress(UserError):
            (cell, group), config = compression_of(self._vae_config), self.parts.denoiser_config
            frames, together = config.get("sample_frames", FRAMES), self._frames_together > 1
            self.media = replace(
                self.media,
                spatial=cell * PATCH,
                temporal=group * LATENTS_A_PART,
                max_frames=2 * frames - 1 if together else frames,
                fps=16.0 if together else 8.0,
            )

    @property
    def _frames_together(self) -> int:
        """How many latent frames are in a token."""
        return self.parts.denoiser_config.get("patch_size_t") or 1

    @property
    def _leading(self) -> int:
        """How many latent frames come before those of a clip."""
        return self._frames_together - 1

    @cached_property
    def starts_from_picture(self) -> bool:
        # `check` reports a damaged configuration.
        with suppress(UserError):
            config = self.parts.denoiser_config
            return config["in_channels"] == 2 * config["out_channels"]
        return False

    @property
    def _own_size(self) -> tuple[int, int]:
        """Width and height, in latent cells, of the clips that it was made for."""
        config = self.parts.denoiser_config
        return config.get("sample_width", SIZE[0]), config.get("sample_height", SIZE[1])

    @property
    def _table(self) -> tuple[int, int, int] | None:
        """Width, height and frames of the only clips for which the model has positions; None without such a table."""
        config = self.parts.denoiser_config
        if not config.get(LEARNED_POSITIONS):
            return None
        cell, _ = compression_of(self._vae_config)
        width, height = self._own_size
        return width * cell, height * cell, config.get("sample_frames", FRAMES)

    @property
    def places(self) -> tuple[int, int] | None:
        if self._frames_together == 1:
            return None
        width, height = self._own_size
        return height // PATCH, width // PATCH

    @cached_property
    def objective(self) -> Epsilon:
        return ddpm_objective(self.options)

    def problems_of_parts(self) -> Iterator[Problem]:
        config, made = self.parts.denoiser_config, self._vae_config["latent_channels"]
        takes, gives, read = config["in_channels"], config["out_channels"], self.parts.text_config("t5")["d_model"]
        if model_index(self.options.diffusers_path).get("_class_name") == CONTROLLED or takes not in (gives, 2 * gives):
            yield self.parts.misfit(
                f"takes {takes} channels for latents of {gives}, and is of CogVideoX-Fun, which is not trained here; "
                "give CogVideoX, or that of picture to video"
            )
        if gives != made:
            yield self.parts.misfit(
                f"gives latents of {gives} channels and the VAE makes {made}; give CogVideoX's own VAE"
            )
        if config["text_embed_dim"] != read:
            yield self.parts.misfit(
                f"takes text of {config['text_embed_dim']} features and T5 makes {read}; give T5-XXL 1.1"
            )
        yield from self._problems_of_tokens()
        if (name := scheduler_config(self.options).get("_class_name")) not in (DDIM, DPM):
            file = str(self.options.diffusers_path / SCHEDULER_FILE)
            yield Problem(file, "", f"is of {name}, and CogVideoX has the noise of {DDIM} or {DPM}; set one of these")

    def _problems_of_tokens(self) -> Iterator[Problem]:
        """Why its tokens are not those of published models."""
        config, together = self.parts.denoiser_config, self._frames_together
        rotary = config.get("use_rotary_positional_embeddings", False)
        if config.get("patch_size", PATCH) != PATCH or together > PATCH or (together > 1 and not rotary):
            yield self.parts.misfit(
                f"takes patches of {config.get('patch_size', PATCH)} x {config.get('patch_size', PATCH)} cells and "
                f"{together} frames together, {'with' if rotary else 'without'} rotary positions; published models "
                "take 2 x 2 cells, and two frames together only with rotary positions"
            )

    def problems_of_data(self, samples: Sequence[Sample]) -> list[Problem]:
        problems = problems_of_stills(samples) if self.starts_from_picture else []
        buckets = [(one.bucket.width, one.bucket.height, one.bucket.frames) for one in samples]
        other = next((bucket for bucket in buckets if self._table not in (None, bucket)), None)
        if other and not problems:
            message = f"{self._misfit_of_table(other)}: size_buckets = [{list(self._table)}]"
            problems.append(Problem("", "[[directory]]", message))
        return problems

    def problems_of_samples(self, sampling: SamplingSettings) -> Iterator[Problem]:
        size = sampling.width, sampling.height, sampling.frames
        if self._table not in (None, size):
            yield Problem("", "[sampling]", self._misfit_of_table(size))

    def _misfit_of_table(self, size: tuple[int, int, int]) -> str:
        width, height, frames = self._table
        return (
            f"{size[0]} x {size[1]} with {size[2]} frames: this model's table of positions is for {width} x {height} "
            f"with {frames} frames alone; set these"
        )

    def encoders(self, controls: int = 0) -> list[ModelEncoder]:
        options = self.options
        vae = (options.diffusers_path, options.vae_path, self.dtype)
        length = self.parts.denoiser_config.get("max_text_seq_length", 226)
        return [
            CogVideoXAutoencoder(*vae, draw=options.latents, leading=self._leading),
            self.parts.text_encoder(T5Features(length)),
            *([CogVideoXFirstFrame(*vae, noised=options.noised_picture)] if self.starts_from_picture else []),
        ]

    def frame_groups(self, frames: int) -> list[int]:
        """The leading latent frames are the first one again."""
        _, group = compression_of(self._vae_config)
        return [0] * self._leading + [1] + [group] * ((frames - 1) // group)

    def build_denoiser(self) -> CogVideoXTransformer3DModel:
        denoiser, learned = super().build_denoiser(), self.parts.denoiser_config.get(LEARNED_POSITIONS)
        positions = getattr(denoiser.patch_embed, "pos_embedding", None)
        if learned:
            # A buffer would be neither read from the files nor trained.
            del denoiser.patch_embed.pos_embedding
            denoiser.patch_embed.pos_embedding = nn.Parameter(positions)
        elif positions is not None:
            # What the stock module makes of its float64 when it adds them.
            denoiser.patch_embed.pos_embedding = positions.to(self.denoiser_dtype)
        return denoiser

    def to_layers(self, denoiser: CogVideoXTransformer3DModel) -> list[nn.Module]:
        reads = {
            "hidden_states": "x_BTD",
            "encoder_hidden_states": "text_BLD",
            "temb": "time_BD",
            "image_rotary_emb": "rope_TE",
        }
        config = denoiser.config
        rope = partial(rotary_tables, config) if config.use_rotary_positional_embeddings else None
        middles = [Middle(block, reads, writes=("x_BTD", "text_BLD")) for block in denoiser.transformer_blocks]
        return [Entry(denoiser, rope), *middles, Exit(denoiser)]

    def prepare_inputs(
        self, features: Features, x_t: torch.Tensor, t_B: torch.Tensor, guidance: float | None = None
    ) -> CogVideoXInputs:
        if self.starts_from_picture:
            # Only in training there are latents, and noise on the picture.
            noised = "latents" in features and self.options.noised_picture
            first = features["noised_first_frame_latents" if noised else "first_frame_latents"].to(x_t)
            behind = first.new_zeros(*first.shape[:2], x_t.shape[2] - 1, *first.shape[3:])
            x_t = torch.cat([x_t, torch.cat([first, behind], dim=2)], dim=1)
        return CogVideoXInputs(
            x_BfChw=rearrange(x_t, "b c f h w -> b f c h w"),
            text_BLD=features["t5"],
            step_B=self.objective.model_time(t_B),
        )

    def before_steps(self, noise: torch.Tensor, features: Features) -> torch.Tensor:
        # The stock pipeline draws it in the order of frames, channels, rows and columns.
        return noise.view(-1, *(noise.shape[dim] for dim in (2, 1, 3, 4))).transpose(1, 2)

    def tokens(self, latent_shape: Sequence[int]) -> int:
        *_, height, width = latent_shape
        return (height // PATCH) * (width // PATCH) // self._frames_together

    def latent_shape(self, width: int, height: int, frames: int = 1) -> tuple[int, ...]:
        channels, count, *size = cogvideox_latent_size(self._vae_config, width, height, frames)
        return channels, self._leading + count, *size

    def scheduler(self) -> Any:
        stock = ddpm_scheduler(self.options)
        return CogVideoXDPMSteps(stock) if type(stock).__name__ == DPM else stock

    # Kept, as every micro-batch asks for it.
    @cached_property
    def _vae_config(self) -> dict[str, Any]:
        return COGVIDEOX.config(self.options.diffusers_path, self.options.vae_path)


def rotary_tables(config: Any, frames: int, height: int, width: int, device: torch.device) -> Rope:
    """Cosines and sines (T, E) of the places of a grid of tokens, as CogVideoX's pipeline gives them: 1.0 centres and
    scales rows and columns to the grid of its own size, 1.5 counts them."""
    from diffusers.models.embeddings import get_3d_rotary_pos_embed
    from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid

    grid, own = (height, width), (config.sample_height // PATCH, config.sample_width // PATCH)
    if config.patch_size_t:
        kind = {"crops_coords": None, "grid_type": "slice", "max_size": own}
    else:
        kind = {"crops_coords": get_resize_crop_region_for_grid(grid, own[1], own[0])}
    return get_3d_rotary_pos_embed(
        config.attention_head_dim, grid_size=grid, temporal_size=frames, device=device, **kind
    )
