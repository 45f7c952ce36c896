"""Cosmos-Predict2.5: one chain of blocks over latent patches that attend to the text, of which all layers of Qwen2.5-VL
are read.

One model makes clips of text alone, and of one or two given latent frames, which are its first picture or its first
five.

Shapes: B batch, C latent channels, f h w latent frames, height and width, L text tokens, D features.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from models.base import Features, ModelEncoder
from models.families.cosmos import CosmosInputs, CosmosModel, places_of
from models.foundation.checkpoints.configs import stock_scheduler
from models.foundation.checkpoints.folders import TextPart
from models.foundation.checkpoints.layouts.cosmos_predict2 import COSMOS_PREDICT2_LAYOUT
from models.foundation.encoders.text import TextEncoder
from models.foundation.encoders.text_features import Shapes, TextFeatures
from models.foundation.encoders.video_vae import WanAutoencoder, latent_size, wan_vae_config
from models.foundation.layers.edm_steps import LevelSteps
from models.foundation.layers.given import with_given_frames
from utils.dataset.buckets import MediaFacts
from utils.errors import Problem
from utils.settings.model_schema import ModelSettings
from utils.settings.values import Count, Part

if TYPE_CHECKING:
    from transformers import PretrainedConfig

TEXT = "qwen2_5_vl"
GIVEN_TIME = 1e-4
"""What the model is told as the time of a frame that is given."""
WRITTEN = (
    "<|im_start|>system\nYou are a helpful assistant who will provide prompts to an image generator.<|im_end|>\n"
    "<|im_start|>user\n{}<|im_end|>\n"
)
TINY = 1e-8
MIB = 2**20


class CosmosPredict25Options(ModelSettings):
    """`[model]` of `type = "cosmos_predict25"`."""

    max_sequence_length: Count = 512
    """Number of Qwen2.5-VL tokens that the model sees, with those of the text around a caption and padding. The cache
    takes 100 MB for a caption of 512."""
    first_frame_share: Part = 0.5
    """The share of the clips that are trained from their first frames, which the model then receives without noise and
    does not have to predict; the others are trained from text alone, as pictures are."""
    second_frame_share: Part = 0.5
    """Of those, the share that are trained from two latent frames, which are the first five of the clip, and not from
    its first alone."""


@dataclass(frozen=True)
class AllStates(TextFeatures):
    """The outputs of all layers of a chat model one after the other, each with mean 0 and deviation 1 (B, L, N D), over
    the caption, the text around it, and the padding up to `length`, which it sees like words."""

    name: str
    length: int

    def shapes(self, config: PretrainedConfig) -> Shapes:
        return {self.name: (self.length, config.num_hidden_layers * config.hidden_size)}

    def written(self, tokenizer: Any, caption: str) -> str:
        return WRITTEN.format(caption)

    def __call__(self, text_encoder: nn.Module, tokenizer: Any, captions: list[str]) -> dict[str, torch.Tensor]:
        texts = [self.written(tokenizer, caption) for caption in captions]
        tokens = tokenizer(texts, padding="max_length", max_length=self.length, truncation=True, return_tensors="pt")
        states = text_encoder(tokens.input_ids.to(text_encoder.device), output_hidden_states=True).hidden_states
        normed = [
            (state - state.mean(dim=-1, keepdim=True)) / (state.std(dim=-1, keepdim=True) + TINY)
            for state in states[1:]
        ]
        return {self.name: torch.cat(normed, dim=-1)}


class CosmosPredict25Pipeline(CosmosModel):
    """Cosmos-Predict2.5 of NVIDIA: text, picture and video to world, which are one model. Samples are drawn from text.
    NVIDIA's licence asks for its guardrail where the model is used; the samples of a run do not pass through one."""

    Options = CosmosPredict25Options
    title = "Cosmos-Predict2.5"
    needs_vae = "the VAE of Wan 2.1"
    config_keys = (*CosmosModel.config_keys, "crossattn_proj_in_channels")
    text_parts = (TextPart(TEXT, "Qwen2_5_VLModel"),)
    media = MediaFacts(spatial=16, temporal=4, max_frames=93, fps=16.0)
    original_layout = COSMOS_PREDICT2_LAYOUT
    comfyui_note = (
        "ComfyUI is not known to have a model of Cosmos-Predict2.5; the file has NVIDIA's names, for what reads these"
    )
    starts_from_picture = False
    told_rate = None

    @property
    def channels(self) -> int:
        return self._vae_config["z_dim"]

    @property
    def takes(self) -> Mapping[int, str]:
        return {self.channels + 1: "the model"}

    def problems_of_text(self) -> Iterator[Problem]:
        _, read = self._text_encoder().shapes[TEXT]
        width = self.parts.denoiser_config["crossattn_proj_in_channels"]
        if width != read:
            yield self.parts.misfit(
                f"takes text of {width} features, and all layers of the encoder make {read}; give Cosmos-Reason1 7B"
            )

    def remarks(self) -> Iterator[tuple[str, str]]:
        yield from super().remarks()
        tokens, width = self._text_encoder().shapes[TEXT]
        size = tokens * width * self.dtype.itemsize / MIB
        yield "max_sequence_length", f"each caption takes {size:.0f} MiB in the cache, as the model reads all layers"

    @property
    def places(self) -> tuple[int, int]:
        return places_of(self.parts.denoiser_config)

    def _text_encoder(self) -> TextEncoder:
        return self.parts.text_encoder(AllStates(TEXT, self.options.max_sequence_length))

    def encoders(self, controls: int = 0) -> list[ModelEncoder]:
        options = self.options
        autoencoder = WanAutoencoder(options.diffusers_path, options.vae_path, self.dtype, draw=options.latents)
        return [autoencoder, self._text_encoder()]

    def prepare_inputs(
        self, features: Features, x_t: torch.Tensor, t_B: torch.Tensor, guidance: float | None = None
    ) -> CosmosInputs:
        x_BCfhw, t_BR = with_given_frames(features, x_t, t_B, GIVEN_TIME)
        return self.inputs_of(features, x_BCfhw, t_BR)

    def text_of(self, features: Features) -> torch.Tensor:
        return features[TEXT]

    def given_frames(self, latent_shape: Sequence[int], quantile: float) -> int:
        share = self.options.first_frame_share
        count = 0 if quantile >= share else 1 + (quantile < share * self.options.second_frame_share)
        return min(count, latent_shape[-3] - 1)

    def latent_shape(self, width: int, height: int, frames: int = 1) -> tuple[int, ...]:
        return latent_size(self._vae_config, width, height, frames)

    def scheduler(self) -> LevelSteps:
        return LevelSteps(stock_scheduler(self.options.diffusers_path, "UniPCMultistepScheduler"))

    # Kept, as every micro-batch asks for it.
    @cached_property
    def _vae_config(self) -> dict[str, Any]:
        return wan_vae_config(self.options.diffusers_path, self.options.vae_path)
