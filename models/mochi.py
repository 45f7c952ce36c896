"""Mochi 1: blocks with two streams of different widths, a wide one for the clip and a narrow one for the text.

Positions are turned by angles that each head has learned; a layer computes them of the frequencies, as tables for all
tokens and heads would be 500 MB for five seconds.

Shapes: B batch, C latent channels, f h w latent frames, height and width, T video tokens, L text tokens, D width of the
transformer, H heads, E half the features of a head.
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
from models.foundation.checkpoints.configs import SCHEDULER_FILE, stock_scheduler
from models.foundation.checkpoints.folders import TextPart, model_index
from models.foundation.checkpoints.layouts.mochi import MOCHI_LAYOUT
from models.foundation.encoders.mochi_vae import MOCHI, MochiAutoencoder, compression_of, mochi_latent_size
from models.foundation.encoders.text_features import TrueLengthFeatures
from models.foundation.layers.chain import Middle
from models.foundation.layers.mochi import InvertedSteps, OwnTextAttention, Rope, rope_of
from utils.dataset.buckets import MediaFacts
from utils.diffusion.objectives import FlowMatching
from utils.errors import Problem, UserError
from utils.json_files import read_json
from utils.settings.model_schema import ModelSettings
from utils.settings.values import Count

if TYPE_CHECKING:
    from diffusers import MochiTransformer3DModel

PATCH = 2
THRESHOLD = 0.025
"""How much noise the first half of a sample's steps takes away, of all of it."""


class MochiOptions(ModelSettings):
    """`[model]` of `type = "mochi"`."""

    max_sequence_length: Count = 256
    """Number of T5 tokens of a caption that are read."""


class MochiInputs(NamedTuple):
    """The inputs of the entry. `text_lengths` has tensors without elements, each as long as the text of a sample; None
    if no text is padded."""

    x_BCfhw: torch.Tensor
    text_BLD: torch.Tensor
    text_mask_BL: torch.Tensor
    text_lengths: tuple[torch.Tensor, ...] | None
    t_B: torch.Tensor


class MochiStream(NamedTuple):
    """What travels from layer to layer. `canvas_fhw0` has no elements: its shape carries the tokens' grid."""

    x_BTD: torch.Tensor
    text_BLD: torch.Tensor
    text_lengths: tuple[torch.Tensor, ...] | None
    time_BD: torch.Tensor
    frequencies_3HE: torch.Tensor
    canvas_fhw0: torch.Tensor

    @property
    def rope_THE(self) -> Rope:
        """Cosines and sines of the angles of all tokens."""
        return rope_of(self.frequencies_3HE, *self.canvas_fhw0.shape[:3])


@dataclass(frozen=True)
class MochiFeatures(TrueLengthFeatures):
    """`TrueLengthFeatures` of which the model may see nothing for an empty caption.

    Attributes:
        empty_is_unseen: whether it does.
    """

    empty_is_unseen: bool = False

    def __call__(self, text_encoder: nn.Module, tokenizer: Any, captions: list[str]) -> dict[str, list[torch.Tensor]]:
        made = super().__call__(text_encoder, tokenizer, captions)
        for caption, mask_L in zip(captions, made[f"{self.name}_mask"], strict=True):
            if self.empty_is_unseen and caption == "":
                mask_L.fill_(False)
        return made


class Entry(nn.Module):
    """Embeds patches, text, and time with the pooled text."""

    def __init__(self, denoiser: MochiTransformer3DModel):
        super().__init__()
        self.patch_embed, self.time_embed = denoiser.patch_embed, denoiser.time_embed
        self.pos_frequencies = denoiser.pos_frequencies

    def forward(self, inputs: MochiInputs) -> MochiStream:
        dtype = self.patch_embed.proj.weight.dtype
        frames, height, width = inputs.x_BCfhw.shape[2:]
        # The time stays float32 until it is embedded: bfloat16 would round 0..1000 to steps of 4.
        time_BD, text_BLD = self.time_embed(
            inputs.t_B, inputs.text_BLD.to(dtype), inputs.text_mask_BL, hidden_dtype=dtype
        )
        x_ETD = self.patch_embed(rearrange(inputs.x_BCfhw.to(dtype), "b c f h w -> (b f) c h w"))
        return MochiStream(
            x_BTD=rearrange(x_ETD, "(b f) t d -> b (f t) d", f=frames),
            text_BLD=text_BLD,
            text_lengths=inputs.text_lengths,
            time_BD=time_BD,
            # In float32 the gradients of all blocks are summed too.
            frequencies_3HE=self.pos_frequencies.float(),
            canvas_fhw0=torch.empty(frames, height // PATCH, width // PATCH, 0, device=x_ETD.device),
        )


class Exit(nn.Module):
    """Projects the video tokens to the latent (B, C, f, h, w)."""

    def __init__(self, denoiser: MochiTransformer3DModel):
        super().__init__()
        self.norm_out, self.proj_out = denoiser.norm_out, denoiser.proj_out

    def forward(self, stream: MochiStream) -> torch.Tensor:
        x_BTC = self.proj_out(self.norm_out(stream.x_BTD, stream.time_BD))
        frames, height, width, _ = stream.canvas_fhw0.shape
        sizes = {"f": frames, "h": height, "w": width, "p": PATCH, "q": PATCH}
        return rearrange(x_BTC, "b (f h w) (p q c) -> b c f (h p) (w q)", **sizes).contiguous()


class MochiPipeline(BasePipeline):
    """Mochi 1 of Genmo: text to video. A folder whose index has `force_zeros_for_empty_prompt`, as the publisher's own
    inference does, is trained so: of an empty caption the model sees nothing."""

    Options = MochiOptions
    denoiser_class = "MochiTransformer3DModel"
    config_keys = ("in_channels", "text_embed_dim")
    text_parts = (TextPart("t5", "T5EncoderModel"),)
    media = MediaFacts(spatial=16, temporal=6, max_frames=163, fps=30.0)
    objective = FlowMatching(predicts_data_minus_noise=True, time_is_cleanness=True, time_scale=1000.0)
    blocks = ("transformer_blocks",)
    stream_type = MochiStream
    original_layout = MOCHI_LAYOUT
    guided_by_second_prediction = True
    noise_in_float32 = True

    def __init__(self, options: MochiOptions, seed: int = 0):
        super().__init__(options, seed)
        # `check` reports what an incomplete folder lacks.
        with suppress(UserError):
            cell, group = compression_of(self._vae_config)
            self.media = replace(self.media, spatial=cell * PATCH, temporal=group)

    def problems_of_parts(self) -> Iterator[Problem]:
        config, made = self.parts.denoiser_config, self._vae_config["latent_channels"]
        takes, read = config["in_channels"], self.parts.text_config("t5")["d_model"]
        if takes != made or config.get("out_channels") not in (None, takes):
            yield self.parts.misfit(
                f"takes latents of {takes} channels, gives {config.get('out_channels') or takes}, and the VAE makes "
                f"{made}; give Mochi 1 and its own VAE"
            )
        if config["text_embed_dim"] != read:
            yield self.parts.misfit(
                f"takes text of {config['text_embed_dim']} features and T5 makes {read}; give T5-XXL 1.1"
            )
        if config.get("patch_size", PATCH) != PATCH:
            yield self.parts.misfit(f"takes patches of {config['patch_size']} cells; give Mochi 1, whose are of 2")
        file = self.options.diffusers_path / SCHEDULER_FILE
        if not read_json(file, kinds={"invert_sigmas": bool}).get("invert_sigmas"):
            yield Problem(str(file), "", "lacks `invert_sigmas`, as Mochi is told how clean a clip is; set it to true")

    def encoders(self, controls: int = 0) -> list[ModelEncoder]:
        options, index = self.options, model_index(self.options.diffusers_path)
        text = MochiFeatures(
            "t5",
            options.max_sequence_length,
            empty_is_unseen=bool(index.get("force_zeros_for_empty_prompt")),
        )
        return [
            MochiAutoencoder(options.diffusers_path, options.vae_path, self.dtype, draw=options.latents),
            self.parts.text_encoder(text),
        ]

    def build_denoiser(self) -> MochiTransformer3DModel:
        denoiser = super().build_denoiser()
        for block in denoiser.transformer_blocks:
            block.attn1.processor = OwnTextAttention()
        return denoiser

    def to_layers(self, denoiser: MochiTransformer3DModel) -> list[nn.Module]:
        reads = {
            "hidden_states": "x_BTD",
            "encoder_hidden_states": "text_BLD",
            "temb": "time_BD",
            "encoder_attention_mask": "text_lengths",
            "image_rotary_emb": "rope_THE",
        }
        middles = [Middle(block, reads, writes=("x_BTD", "text_BLD")) for block in denoiser.transformer_blocks]
        return [Entry(denoiser), *middles, Exit(denoiser)]

    def prepare_inputs(
        self, features: Features, x_t: torch.Tensor, t_B: torch.Tensor, guidance: float | None = None
    ) -> MochiInputs:
        text_BLD, mask_BL = features["t5"], features["t5_mask"].bool()
        lengths = mask_BL.sum(dim=1).tolist()
        return MochiInputs(
            x_BCfhw=x_t,
            text_BLD=text_BLD,
            text_mask_BL=mask_BL,
            text_lengths=tuple(torch.empty(n, 0) for n in lengths) if min(lengths) < text_BLD.shape[1] else None,
            t_B=self.objective.model_time(t_B),
        )

    def tokens(self, latent_shape: Sequence[int]) -> int:
        *_, height, width = latent_shape
        return (height // PATCH) * (width // PATCH)

    def latent_shape(self, width: int, height: int, frames: int = 1) -> tuple[int, ...]:
        return mochi_latent_size(self._vae_config, width, height, frames)

    def scheduler(self) -> InvertedSteps:
        return InvertedSteps(stock_scheduler(self.options.diffusers_path, "FlowMatchEulerDiscreteScheduler"))

    def sampling_levels(self, steps: int) -> Sequence[float]:
        """Half of the steps take away little noise, evenly; the others ever more, and fit on to them."""
        from diffusers.pipelines.mochi.pipeline_mochi import linear_quadratic_schedule

        # The stock pipeline divides by half the number of steps.
        return linear_quadratic_schedule(steps, THRESHOLD) if steps > 1 else [1.0]

    # Kept, as every micro-batch asks for it.
    @cached_property
    def _vae_config(self) -> dict[str, Any]:
        return MOCHI.config(self.options.diffusers_path, self.options.vae_path)
