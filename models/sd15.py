"""Stable Diffusion 1.5."""

from __future__ import annotations

from typing import Any

from models.families.stable_diffusion import StableDiffusionOptions, StableDiffusionPipeline, TextPart
from utils.errors import UserError
from utils.settings.values import Count


class Sd15Options(StableDiffusionOptions):
    """`[model]` of `type = "sd15"`."""

    clip_skip: Count = 1
    """Which of CLIP's layers, counted from the last, the text is taken from: 1 for the model as it was published, 2
    for many that are trained on drawings."""


class Sd15Pipeline(StableDiffusionPipeline):
    """Stable Diffusion 1.5 of Runway, and its many descendants."""

    Options = Sd15Options
    texts = (
        TextPart(
            "clip_l",
            "text_encoder",
            "tokenizer",
            lr_option="text_encoder_1_lr",
            prefix="cond_stage_model.transformer.",
            lora_prefix="lora_te",
        ),
    )
    addition = None
    other = 'SDXL\'s (type = "sdxl")'

    def _check_variant(self) -> None:
        super()._check_variant()
        skip, layers = self.options.clip_skip, self._text_encoder(self.texts[0]).config().num_hidden_layers
        if skip > layers:
            raise UserError.of(
                f"{skip} is more than the text encoder's {layers} layers; 1 or 2 is usual", where="[model] clip_skip"
            )

    def text_features(self) -> dict[str, Any]:
        return {"layer": -self.options.clip_skip, "normalised": True}
