"""Cosmos 1.0: one chain of blocks over latent patches that attend to the text, with learned tables of positions.

It covers text to world, and video to world, which goes on from the first frames of a clip. It is trained and drawn as
in Karras et al. 2022 ("Elucidating the design space").

Shapes: B batch, C latent channels, f h w latent frames, height and width, R rows of time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch

from models.base import Features, ModelEncoder
from models.families.cosmos import CosmosInputs, CosmosModel, with_first_frame
from models.foundation.checkpoints.configs import stock_scheduler
from models.foundation.checkpoints.layouts.cosmos import COSMOS_LAYOUT
from models.foundation.encoders.cosmos_vae import (
    COSMOS,
    SIGMA_DATA,
    CosmosAutoencoder,
    CosmosFirstFrame,
    cosmos_latent_size,
)
from models.foundation.encoders.text_features import TrueLengthFeatures
from models.foundation.layers.edm_steps import PreconditionedSteps
from models.foundation.layers.given import with_given_frames
from utils.dataset.buckets import MediaFacts
from utils.diffusion.objectives import EDM
from utils.errors import Problem, UserError
from utils.settings.model_schema import ModelSettings
from utils.settings.values import Count, Part, Positive

TEACHABLE = {"sigma_data": SIGMA_DATA, "prediction_type": "epsilon"}
"""What the scheduler's configuration must say of the model."""


class CosmosOptions(ModelSettings):
    """`[model]` of `type = "cosmos"`."""

    max_sequence_length: Count = 512
    """Number of T5 tokens that the model sees, including padding."""
    frame_rate: Positive = 30.0
    """Frames per second of clips, which the model is told: they are read at this rate, and samples have it."""
    second_frame_share: Part = 0.5
    """Of video to world: the share of the clips that are trained from two latent frames, which are the first nine of
    the clip, and not from its first alone."""


class CosmosPipeline(CosmosModel):
    """Cosmos 1.0 of NVIDIA: text to world and video to world. NVIDIA's licence asks for its guardrail where the model
    is used; the samples of a run do not pass through one."""

    Options = CosmosOptions
    title = "Cosmos 1.0"
    needs_vae = "the tokenizer of Cosmos 1.0"
    from_text = "text to world"
    media = MediaFacts(spatial=16, temporal=8, max_frames=121, fps=30.0)
    objective = EDM(SIGMA_DATA)
    keep_in_high_precision = ("learnable_pos_embed",)
    original_layout = COSMOS_LAYOUT

    def __init__(self, options: CosmosOptions, seed: int = 0):
        super().__init__(options, seed)
        # `check` reports what an incomplete folder lacks.
        with suppress(UserError):
            # The tokenizer knows mean and deviation of so many latent frames.
            known = len(self._vae_config.get("latents_mean") or ()) // self.channels
            limit = (known - 1) * self.media.temporal + 1 if known else self.media.max_frames
            self.media = replace(self.media, max_frames=min(limit, self.media.max_frames))

    @property
    def channels(self) -> int:
        return self._vae_config["latent_channels"]

    def problems_of_parts(self) -> Iterator[Problem]:
        yield from super().problems_of_parts()
        said = self.scheduler().config
        for key, value in TEACHABLE.items():
            if said[key] != value:
                message = f"is {said[key]}, and Cosmos 1.0 has {value}; give the model's own scheduler"
                yield Problem(str(self.options.diffusers_path / "scheduler"), key, message)

    @property
    def places(self) -> tuple[int, int]:
        _, rows, columns = (
            size // patch for size, patch in zip(self.parts.denoiser_config["max_size"], self.patch, strict=True)
        )
        return rows, columns

    def encoders(self, controls: int = 0) -> list[ModelEncoder]:
        options = self.options
        vae = (options.diffusers_path, options.vae_path, self.dtype)
        return [
            CosmosAutoencoder(*vae, draw=options.latents),
            self.parts.text_encoder(TrueLengthFeatures("t5", options.max_sequence_length)),
            # In training the first frame is that of the latents; this one is for samples.
            *([CosmosFirstFrame(*vae)] if self.starts_from_picture else []),
        ]

    def prepare_inputs(
        self, features: Features, x_t: torch.Tensor, t_B: torch.Tensor, guidance: float | None = None
    ) -> CosmosInputs:
        given_BC1hw = None
        if self.starts_from_picture and "latents" not in features:
            # A sample: its given frame goes straight to the clean picture.
            first_BC1hw = features["first_frame_latents"].to(x_t)
            given_BC1hw = self.objective.prediction_of(first_BC1hw, x_t[:, :, :1], t_B)
            features = with_first_frame(features, first_BC1hw, x_t.shape[2])
        # A frame without noise is seen at c_in of no noise; all frames are told the time of the others.
        seen = {**features, "latents": features["latents"] / SIGMA_DATA} if "given_frames" in features else features
        x_BCfhw, _ = with_given_frames(seen, x_t, t_B)
        t_BR = self.objective.model_time(t_B).unsqueeze(1)
        return self.inputs_of(features, x_BCfhw, t_BR, given_BC1hw)

    def latent_shape(self, width: int, height: int, frames: int = 1) -> tuple[int, ...]:
        return cosmos_latent_size(self._vae_config, width, height, frames)

    def scheduler(self) -> PreconditionedSteps:
        return PreconditionedSteps(stock_scheduler(self.options.diffusers_path, "EDMEulerScheduler"))

    # Kept, as every micro-batch asks for it.
    @cached_property
    def _vae_config(self) -> dict[str, Any]:
        return COSMOS.config(self.options.diffusers_path, self.options.vae_path)
