"""Qwen-Image-Layered, which decomposes a picture into layers with transparency.

Shapes: B batch, P pictures (the whole one, then its layers from the lowest to the top), H W pixels, T image tokens, C
latent channels, D width, E rows of time embedding, h w latent cells.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from models.base import BasePipeline, Features, ModelEncoder
from models.foundation.checkpoints.key_layouts import KeyLayout, KeyRule
from models.foundation.checkpoints.layouts.qwen_image import QWEN_LAYOUT
from models.foundation.encoders.qwen_image_prompts import Variant
from models.foundation.encoders.video_vae import QwenImageAutoencoder, on_grey
from models.qwen_image import Entry, Exit, QwenImagePipeline
from utils.dataset.encoders import Encoder
from utils.dataset.samples import Bucket, Control, Sample
from utils.diffusion.timesteps import ResolutionShift
from utils.errors import Problem, UserError
from utils.settings.model_schema import ModelSettings
from utils.settings.values import Count

if TYPE_CHECKING:
    from diffusers import QwenImageTransformer2DModel

CONDITION = "rgba"
CHANNELS = 4
"""The channels of a pixel: colours and opacity."""
TRANSPARENCY = "time_text_embed.addition_t_embedding"
TRANSLUCENT = 0
"""The class of pictures that the model is conditioned on; 1 means without transparency."""
BASE_TOKENS = 256


class QwenImageLayeredOptions(ModelSettings):
    """`[model]` of `type = "qwen_image_layered"`."""

    layers: Count = 4
    """Number of layers into which each picture is decomposed; the dataset has as many folders in `control_path`, from
    the lowest layer to the top."""
    max_sequence_length: Count = 512
    """Number of tokens of a caption that are read."""


class LayersAutoencoder(QwenImageAutoencoder):
    """Qwen-Image-Layered's VAE as an `Encoder` of `pictures` pictures that belong together, each by itself."""

    def __init__(self, *others: Any, pictures: int, **named: Any):
        super().__init__(*others, **named)
        self.name, self.reads, self.pictures = "vae_layers", ("layers",), pictures

    def encode(self, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        """Latents (B, C, P, h, w) of pictures (B, 4, P, H, W) in [-1, 1]."""
        (pixels_B4PHW,) = inputs.values()
        encode = super().encode
        made = [encode(pixels=one_B41HW) for one_B41HW in pixels_B4PHW.split(1, dim=2)]
        return {name: torch.cat([one[name] for one in made], dim=2) for name in self.outputs}

    def decode(self, latents_BCPhw: torch.Tensor) -> torch.Tensor:
        """Pixels (B, 3, 1, H, P W) in [-1, 1]: the pictures side by side, on grey."""
        decode = super().decode
        return on_grey(torch.cat([decode(one_BC1hw) for one_BC1hw in latents_BCPhw.split(1, dim=2)], dim=-1))

    def feature_shapes(self, bucket: Bucket) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        shapes = super().feature_shapes(bucket)
        return {name: ((shape[0], self.pictures, *shape[2:]), dtype) for name, (shape, dtype) in shapes.items()}


class LayeredEntry(Entry):
    """The entry with the condition for transparency."""

    def embedded_time(self, t_E: torch.Tensor, x_BTD: torch.Tensor) -> torch.Tensor:
        return self.time_text_embed(t_E, x_BTD, torch.full(t_E.shape, TRANSLUCENT, device=t_E.device))


class LayeredShift(ResolutionShift):
    """log s is the square root of the number of tokens of one picture relative to a fixed number, as in the stock
    pipeline of Qwen-Image-Layered, which ignores its scheduler's configuration here."""

    fitted_to = None

    def mu(self, tokens: int, steps: int = 50) -> float:
        return math.sqrt(tokens / BASE_TOKENS)


class QwenImageLayeredPipeline(QwenImagePipeline):
    """Qwen-Image-Layered of Alibaba. A sample's own picture is the whole, and its control images are the layers, from
    the lowest to the top, all of one size and with transparency. It predicts the whole first, then the layers; samples
    show them in that order, side by side on grey. Inference makes a caption of the picture if it is given none, so a
    dataset should have captions of the whole picture."""

    Options = QwenImageLayeredOptions
    resolution_shift = LayeredShift()
    layered = True
    starts_from_picture = True
    original_layout = KeyLayout([*QWEN_LAYOUT.rules, KeyRule(TRANSPARENCY, (TRANSPARENCY,))])
    _variant = Variant()

    @property
    def max_controls(self) -> int:
        return self.options.layers

    @property
    def pictures(self) -> int:
        """How many are drawn together: the whole, and its layers."""
        return 1 + self.options.layers

    def problems_of_parts(self) -> Iterator[Problem]:
        yield from super().problems_of_parts()
        channels = self._vae_config.get("input_channels", 3)
        if channels != CHANNELS:
            message = (
                f"`input_channels` must be {CHANNELS}, which are colours and transparency, and is {channels}; take the "
                "VAE of Qwen-Image-Layered"
            )
            yield Problem(str(self.options.diffusers_path / "vae" / "config.json"), "", message)

    def encoders_for(self, controls: int) -> list[Encoder]:
        layers = self.options.layers
        if controls != layers:
            raise UserError.of(
                f"this model takes pictures apart into {layers} layers, and the samples have {controls}: name the "
                "folders of the layers in control_path, from the lowest to the top, and set [model] layers to their "
                "number",
                where="[[directory]]",
            )
        return self.encoders()

    def problems_of_data(self, samples: Sequence[Sample]) -> list[Problem]:
        reasons = {
            f"do not have {self.options.layers} layers; name as many folders in control_path as [model] layers says": (
                lambda sample: len(sample.controls) != self.options.layers
            ),
            "have layers of another size; leave control_resolution out": (
                lambda sample: any(layer.bucket != sample.bucket for layer in sample.controls)
            ),
            "have control_fit, and layers lie on their picture as they are; leave control_fit out": (
                lambda sample: sample.rules.control_fit is not None
            ),
            "have a layer whose file has another width or height than the picture's, so that they do not lie on one "
            "another; bring them to one size": (
                lambda sample: any(size_of(layer) != size_of(sample) for layer in sample.controls)
            ),
            "have a mask, which cannot say what it means for layers; leave masks out": (
                lambda sample: sample.mask is not None
            ),
        }
        found = {reason: [sample for sample in samples if is_wrong(sample)] for reason, is_wrong in reasons.items()}
        return [
            Problem("", "[[directory]]", f"{len(some)} of the samples, the first is {some[0].media.locator}, {reason}")
            for reason, some in found.items()
            if some
        ]

    def encoders(self, controls: int = 0) -> list[ModelEncoder]:
        vae = (self.options.diffusers_path, self.options.vae_path, self.dtype)
        return [
            LayersAutoencoder(*vae, pictures=self.pictures, draw=self.options.latents),
            self._text_encoder(0),
            # By itself, since prompts have it too, which have no layers.
            QwenImageAutoencoder(*vae, reads=CONDITION, draw="mode"),
        ]

    def to_layers(self, denoiser: QwenImageTransformer2DModel) -> list[nn.Module]:
        _, *middles, _ = super().to_layers(denoiser)
        return [LayeredEntry(denoiser), *middles, Exit(denoiser, self.pictures)]

    def _pictures(self, features: Features, x_t: torch.Tensor) -> list[torch.Tensor]:
        return [*x_t.split(1, dim=2), features[f"{CONDITION}_latents"].float()]

    def guided(self, prompted: torch.Tensor, negative: torch.Tensor, guidance: float) -> torch.Tensor:
        """The usual guidance: the stock pipeline keeps the norm of tokens only if requested."""
        return BasePipeline.guided(self, prompted, negative, guidance)

    def latent_shape(self, width: int, height: int, frames: int = 1) -> tuple[int, ...]:
        channels, _, *size = super().latent_shape(width, height)
        return channels, self.pictures, *size


def size_of(input_name: Sample | Control) -> tuple[int, int]:
    """Width and height of its file."""
    return input_name.media.width, input_name.media.height
