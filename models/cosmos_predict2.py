"""Cosmos-Predict2: one chain of blocks over latent patches that attend to the text.

It covers text to image, and video to world, which goes on from the first frames of a clip.

Shapes: B batch, C latent channels, f h w latent frames, height and width, T tokens, L text tokens, R rows of time, D
width of the transformer.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch

from models.base import Features, ModelEncoder
from models.families.cosmos import CosmosInputs, CosmosModel, places_of, with_first_frame
from models.foundation.checkpoints.configs import stock_scheduler
from models.foundation.checkpoints.layouts.cosmos_predict2 import COSMOS_PREDICT2_LAYOUT
from models.foundation.encoders.first_frame import LoneFrameAutoencoder
from models.foundation.encoders.text_features import TrueLengthFeatures
from models.foundation.encoders.video_vae import WanAutoencoder, latent_size, wan_vae_config
from models.foundation.layers.edm_steps import EdmSteps
from models.foundation.layers.given import with_given_frames
from utils.dataset.buckets import MediaFacts
from utils.errors import UserError
from utils.settings.model_schema import ModelSettings
from utils.settings.values import Count, Part, Positive

GIVEN_SIGMA = 1e-4
GIVEN_TIME = GIVEN_SIGMA / (1 + GIVEN_SIGMA)
"""What the model is told as the time of a frame that is given."""


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


class CosmosPredict2Pipeline(CosmosModel):
    """Cosmos-Predict2 of NVIDIA: text to image, which is trained on pictures alone, and video to world. NVIDIA's
    licence asks for its guardrail where the model is used; the samples of a run do not pass through one."""

    Options = CosmosPredict2Options
    title = "Cosmos-Predict2"
    needs_vae = "the VAE of Wan 2.1"
    from_text = "text to image"
    media = MediaFacts(spatial=16, temporal=4, max_frames=93, fps=16.0)
    original_layout = COSMOS_PREDICT2_LAYOUT

    def __init__(self, options: CosmosPredict2Options, seed: int = 0):
        super().__init__(options, seed)
        # `check` reports what an incomplete folder lacks.
        with suppress(UserError):
            self.media = replace(self.media, max_frames=self.media.max_frames if self.starts_from_picture else 1)

    @property
    def channels(self) -> int:
        return self._vae_config["z_dim"]

    @property
    def places(self) -> tuple[int, int]:
        return places_of(self.parts.denoiser_config)

    def encoders(self, controls: int = 0) -> list[ModelEncoder]:
        options, folder = self.options, self.options.diffusers_path
        # In training the first frame is that of the latents; this one is for samples.
        first_frame = LoneFrameAutoencoder(folder, options.vae_path, self.dtype)
        return [
            WanAutoencoder(folder, options.vae_path, self.dtype, draw=options.latents),
            self.parts.text_encoder(TrueLengthFeatures("t5", options.max_sequence_length)),
            *([first_frame] if self.starts_from_picture else []),
        ]

    def prepare_inputs(
        self, features: Features, x_t: torch.Tensor, t_B: torch.Tensor, guidance: float | None = None
    ) -> CosmosInputs:
        given_BC1hw = None
        if self.starts_from_picture and "latents" not in features:
            # A sample: its given frame goes straight to the clean picture.
            first_BC1hw = features["first_frame_latents"].to(x_t)
            given_BC1hw = (x_t[:, :, :1] - first_BC1hw) / t_B.view(-1, 1, 1, 1, 1)
            features = with_first_frame(features, first_BC1hw, x_t.shape[2])
        x_BCfhw, t_BR = with_given_frames(features, x_t, t_B, GIVEN_TIME)
        return self.inputs_of(features, x_BCfhw, t_BR, given_BC1hw)

    def latent_shape(self, width: int, height: int, frames: int = 1) -> tuple[int, ...]:
        return latent_size(self._vae_config, width, height, frames)

    def scheduler(self) -> EdmSteps:
        return EdmSteps(stock_scheduler(self.options.diffusers_path, "FlowMatchEulerDiscreteScheduler"))

    # Kept, as every micro-batch asks for it.
    @cached_property
    def _vae_config(self) -> dict[str, Any]:
        return wan_vae_config(self.options.diffusers_path, self.options.vae_path)
