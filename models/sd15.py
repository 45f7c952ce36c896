"""Stable Diffusion 1.5."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from models.families.stable_diffusion import ClipPart, StableDiffusionOptions, StableDiffusionPipeline
from models.foundation.checkpoints.weights import CheckpointNames
from utils.errors import Problem
from utils.settings.values import Count


class Sd15Options(StableDiffusionOptions):
    """`[model]` of `type = "sd15"`."""

    clip_skip: Count = 1
    """The layer of CLIP, counted from the last, from which the text is taken: 1 for the model as published, 2 for many
    models that are trained on drawings."""


class Sd15Pipeline(StableDiffusionPipeline):
    """Stable Diffusion 1.5 of Runway, and its many descendants."""

    Options = Sd15Options
    spec_architecture = "stable-diffusion-v1"
    text_parts = (
        ClipPart(
            "clip_l",
            "CLIPTextModel",
            names=CheckpointNames("cond_stage_model.transformer."),
            lr_option="text_encoder_1_lr",
            lora_prefixes=("lora_te", "lora_te1"),
        ),
    )
    addition = None
    other = 'SDXL\'s (type = "sdxl")'

    def problems_of_parts(self) -> Iterator[Problem]:
        yield from super().problems_of_parts()
        skip, layers = self.options.clip_skip, self._text_encoder(self.text_parts[0]).config().num_hidden_layers
        if skip > layers:
            message = f"{skip} is more than the text encoder's {layers} layers; 1 or 2 is usual"
            yield Problem("", "[model] clip_skip", message)

    @property
    def comfyui_note(self) -> str | None:
        if self.objective.kind != "v":
            return None
        zsnr = str(self.objective.schedule.zero_terminal_snr).lower()
        return (
            "ComfyUI takes every Stable Diffusion 1.5 for one that predicts noise, and no file can tell it otherwise; "
            "this one predicts v: there, put the node ModelSamplingDiscrete with sampling = v_prediction and "
            f"zsnr = {zsnr} between model and sampler"
        )

    def text_features(self) -> dict[str, Any]:
        return {"layer": -self.options.clip_skip, "normalised": True}
