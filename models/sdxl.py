"""Stable Diffusion XL.

Shapes: B batch.
"""

from __future__ import annotations

import torch

from models.base import Features, ModelEncoder
from models.families.stable_diffusion import ClipPart, StableDiffusionOptions, StableDiffusionPipeline, UNetInputs
from models.foundation.checkpoints.sd_single_file import open_clip_original
from models.foundation.checkpoints.weights import CheckpointNames
from models.foundation.encoders.sizes import SIZES, SizeEncoder
from utils.settings.values import OptionalRate


class SdxlOptions(StableDiffusionOptions):
    """`[model]` of `type = "sdxl"`."""

    text_encoder_2_lr: OptionalRate = None
    """Train the second text encoder (OpenCLIP-G) too, with this learning rate; default, and with 0: it is frozen, and
    its features of captions are cached."""


class SdxlPipeline(StableDiffusionPipeline):
    """Stable Diffusion XL of Stability AI, and its descendants: Pony, Illustrious, NoobAI."""

    Options = SdxlOptions
    spec_architecture = "stable-diffusion-xl-v1-base"
    text_parts = (
        ClipPart(
            "clip_l",
            "CLIPTextModel",
            names=CheckpointNames("conditioner.embedders.0.transformer."),
            lr_option="text_encoder_1_lr",
            lora_prefixes=("lora_te1", "lora_te"),
        ),
        ClipPart(
            "clip_g",
            "CLIPTextModelWithProjection",
            "text_encoder_2",
            "tokenizer_2",
            names=open_clip_original("conditioner.embedders.1.model."),
            lr_option="text_encoder_2_lr",
            lora_prefixes=("lora_te2",),
            is_open_clip=True,
        ),
    )
    addition = "text_time"
    other = 'that of Stable Diffusion 1.5 or 2 (type = "sd15")'

    def encoders(self, controls: int = 0) -> list[ModelEncoder]:
        return [*super().encoders(controls), SizeEncoder()]

    def prepare_inputs(
        self, features: Features, x_t: torch.Tensor, t_B: torch.Tensor, guidance: float | None = None
    ) -> UNetInputs:
        inputs = super().prepare_inputs(features, x_t, t_B, guidance)
        height, width = (side * self.cell for side in x_t.shape[2:])
        # Samples are drawn like pictures that were not cropped.
        whole = torch.tensor([height, width, 0, 0, height, width], dtype=torch.float32).repeat(len(x_t), 1)
        return inputs._replace(sizes_B6=features.get(SIZES, whole))
