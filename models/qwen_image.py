"""Qwen-Image and its Edit models: Edit, Edit-Plus (2509) and 2511.

Shapes: B batch, T image tokens (of the noisy picture, then of its control images), L text tokens, C latent channels,
D width, E rows of time embedding, h w latent cells.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import nn

from models.base import Features, ModelEncoder
from models.families.qwen_pictures import QwenPicturePipeline, pack, unpack
from models.foundation.checkpoints.folders import TextPart, model_index, problems_of
from models.foundation.checkpoints.headers import read_header
from models.foundation.checkpoints.key_layouts import KeyLayout
from models.foundation.checkpoints.layouts.qwen_image import QWEN_LAYOUT, TIMESTEP_ZERO, TimestepZeroLayout
from models.foundation.encoders.qwen_image_prompts import CONTROLS, VARIANTS, Variant, caption_prompt
from models.foundation.encoders.qwen_vl import PictureTextEncoder
from models.foundation.encoders.text import TextEncoder
from models.foundation.layers.chain import Middle
from models.foundation.layers.patches import PATCH
from utils.dataset.encoders import Encoder
from utils.diffusion.timesteps import RESOLUTION_SHIFTS
from utils.errors import Problem
from utils.settings.model_schema import ModelSettings
from utils.settings.values import Count

if TYPE_CHECKING:
    from diffusers import QwenImageTransformer2DModel

logger = logging.getLogger(__name__)

TEXT = "qwen2_5_vl"
PIPELINES = {
    "QwenImageEditPipeline": "edit",
    "QwenImageEditInpaintPipeline": "edit",
    "QwenImageEditPlusPipeline": "edit_plus",
}
"""Their names in `model_index.json`; all others are `image`."""

LAYERED = ("use_layer3d_rope", "use_additional_t_cond")
"""A key that only the configuration of a transformer for layers has."""


class QwenImageOptions(ModelSettings):
    """`[model]` of `type = "qwen_image"`."""

    variant: Literal["image", "edit", "edit_plus"] | None = None
    """Whether the weights belong to an Edit model (`edit`: the first one, with one control image; `edit_plus`: 2509 and
    2511, with up to three); default: as `model_index.json` of the folder says."""
    max_sequence_length: Count = 512
    """Number of tokens of a caption that are read. With control images all tokens are read."""


class QwenImageInputs(NamedTuple):
    """The inputs of the entry. `canvases_hw0` have no elements: their shapes carry height and width of the latents,
    first of the noisy one. Without a mask, no text is padded."""

    x_BTC: torch.Tensor
    text_BLD: torch.Tensor
    text_mask_BL: torch.Tensor | None
    t_B: torch.Tensor
    canvases_hw0: tuple[torch.Tensor, ...]


class QwenImageStream(NamedTuple):
    """What travels from layer to layer. Models that treat control images as free of noise have two rows of
    time embedding per sample, E = 2B, and an index of the row for each token."""

    x_BTD: torch.Tensor
    text_BLD: torch.Tensor
    text_mask_BL: torch.Tensor | None
    time_ED: torch.Tensor
    time_row_BT: torch.Tensor | None
    rope_TD_LD: tuple[torch.Tensor, torch.Tensor]
    canvases_hw0: tuple[torch.Tensor, ...]


class Entry(nn.Module):
    """Embeds tokens, text, time and positions. Each stage makes the rotary tables itself."""

    remakes = ("rope_TD_LD",)

    def __init__(self, denoiser: QwenImageTransformer2DModel):
        super().__init__()
        self.img_in = denoiser.img_in
        self.txt_norm = denoiser.txt_norm
        self.txt_in = denoiser.txt_in
        self.time_text_embed = denoiser.time_text_embed
        self.pos_embed = denoiser.pos_embed
        self.zero_cond_t = denoiser.zero_cond_t

    def forward(self, inputs: QwenImageInputs) -> QwenImageStream:
        dtype = self.img_in.weight.dtype
        x_BTD = self.img_in(inputs.x_BTC.to(dtype))
        # t stays float32 until it is embedded.
        t_E, time_row_BT = inputs.t_B, None
        if self.zero_cond_t:
            t_E = torch.cat([t_E, t_E * 0])
            time_row_BT = torch.ones(x_BTD.shape[:2], dtype=torch.int32, device=x_BTD.device)
            height, width, _ = inputs.canvases_hw0[0].shape
            time_row_BT[:, : (height // PATCH) * (width // PATCH)] = 0
        text_BLD = self.txt_in(self.txt_norm(inputs.text_BLD.to(dtype)))
        return QwenImageStream(
            x_BTD=x_BTD,
            text_BLD=text_BLD,
            text_mask_BL=inputs.text_mask_BL,
            time_ED=self.embedded_time(t_E, x_BTD),
            time_row_BT=time_row_BT,
            rope_TD_LD=self._rope(inputs.canvases_hw0, text_BLD),
            canvases_hw0=inputs.canvases_hw0,
        )

    def remake(self, stream: QwenImageStream) -> dict[str, Any]:
        """The fields that are not sent from stage to stage."""
        return {"rope_TD_LD": self._rope(stream.canvases_hw0, stream.text_BLD)}

    def _rope(
        self, canvases_hw0: tuple[torch.Tensor, ...], text_BLD: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        grids = [(1, canvas.shape[0] // PATCH, canvas.shape[1] // PATCH) for canvas in canvases_hw0]
        return self.pos_embed([grids], max_txt_seq_len=text_BLD.shape[1], device=text_BLD.device)

    def embedded_time(self, t_E: torch.Tensor, x_BTD: torch.Tensor) -> torch.Tensor:
        return self.time_text_embed(t_E, x_BTD)


class Exit(nn.Module):
    """Projects the noisy tokens to the latent (B, C, f, h, w) of `pictures` pictures."""

    def __init__(self, denoiser: QwenImageTransformer2DModel, pictures: int = 1):
        super().__init__()
        self.pictures = pictures
        self.norm_out = denoiser.norm_out
        self.proj_out = denoiser.proj_out

    def forward(self, stream: QwenImageStream) -> torch.Tensor:
        x_BTC = self.proj_out(self.norm_out(stream.x_BTD, stream.time_ED[: len(stream.x_BTD)]))
        height, width, _ = stream.canvases_hw0[0].shape
        return unpack(x_BTC[:, : self.pictures * (height // PATCH) * (width // PATCH)], height, width)


class QwenImagePipeline(QwenPicturePipeline):
    """Qwen-Image of Alibaba. Control images are encoded at the size that the dataset gives them (inference scales those
    of
    2509 and 2511 to the area of 1024 x 1024: `control_resolution = 1024`); the text encoder sees them at the same size
    as in inference."""

    Options = QwenImageOptions
    denoiser_class = "QwenImageTransformer2DModel"
    text_parts = (TextPart(TEXT, "Qwen2_5_VLModel"),)
    blocks = ("transformer_blocks",)
    stream_type = QwenImageStream
    resolution_shift = RESOLUTION_SHIFTS["qwen"]
    guided_by_second_prediction = True
    layered = False
    """Whether it makes the layers of a picture."""

    @property
    def max_controls(self) -> int:
        return self._variant.controls

    @property
    def original_layout(self) -> KeyLayout:
        return TimestepZeroLayout(QWEN_LAYOUT.rules) if self.parts.denoiser_config.get("zero_cond_t") else QWEN_LAYOUT

    def problems_of_parts(self) -> Iterator[Problem]:
        config = self.parts.denoiser_config
        if {bool(config.get(key)) for key in LAYERED} != {self.layered}:
            kind, fitting = ("not ", "qwen_image") if self.layered else ("", "qwen_image_layered")
            yield self.parts.misfit(
                f'is {kind}of Qwen-Image-Layered; set [model] type = "{fitting}", or give another model'
            )
            return
        _, text_width = self._text_encoder(0).shapes[TEXT]
        fed = {"in_channels": PATCH**2 * self._vae_config["z_dim"], "joint_attention_dim": text_width}
        for key, size in fed.items():
            if config.get(key, size) != size:
                yield self.parts.misfit(
                    f"has `{key}` {config[key]}, where the VAE and the text encoder beside it make {size}; is one of "
                    "them another model's?"
                )
        override = self.options.transformer_path
        if (
            override
            and not config.get("zero_cond_t")
            and _is_timestep_zero(read_header(override, with_gguf=True).files)
        ):
            message = (
                "is a file of Qwen-Image-Edit-2511, and the configuration in diffusers_path is of another model; give "
                "the folder of 2511"
            )
            yield Problem(str(override), "", message)
        if self._variant.controls:
            yield from problems_of([self._text_encoder(1).check_pictures])

    def encoders_for(self, controls: int) -> list[Encoder]:
        if self.max_controls and not controls:
            logger.warning(
                "an Edit model is trained to make pictures of text alone: no [[directory]] has a control_path with the "
                "pictures that are edited"
            )
        return super().encoders_for(controls)

    def encoders(self, controls: int = 0) -> list[ModelEncoder]:
        return [
            self.autoencoder(),
            self._text_encoder(controls),
            *(self.autoencoder(reads=control, draw="mode") for control in CONTROLS[:controls]),
        ]

    def _text_encoder(self, controls: int) -> TextEncoder:
        """The text encoder for captions, or for captions together with this many control images. An Edit model reads
        captions without pictures with the prompt of Qwen-Image."""
        variant, length = self._variant, self.options.max_sequence_length
        if not controls:
            return self.parts.text_encoder(caption_prompt(TEXT, length))
        pictures = {"controls": controls, "area": variant.area, "caption_tokens": length}
        return self.parts.text_encoder(variant.prompt(TEXT, controls), PictureTextEncoder, **pictures)

    def to_layers(self, denoiser: QwenImageTransformer2DModel) -> list[nn.Module]:
        reads = {
            "hidden_states": "x_BTD",
            "encoder_hidden_states": "text_BLD",
            "encoder_hidden_states_mask": "text_mask_BL",
            "temb": "time_ED",
            "image_rotary_emb": "rope_TD_LD",
            "modulate_index": "time_row_BT",
        }
        middles = [Middle(block, reads, writes=("text_BLD", "x_BTD")) for block in denoiser.transformer_blocks]
        return [Entry(denoiser), *middles, Exit(denoiser)]

    def prepare_inputs(
        self, features: Features, x_t: torch.Tensor, t_B: torch.Tensor, guidance: float | None = None
    ) -> QwenImageInputs:
        pictures = self._pictures(features, x_t)
        mask_BL = features[f"{TEXT}_mask"].bool()
        return QwenImageInputs(
            x_BTC=torch.cat([pack(picture) for picture in pictures], dim=1),
            text_BLD=features[TEXT],
            # With a mask, even of ones, attention is slower.
            text_mask_BL=None if mask_BL.all() else mask_BL,
            t_B=t_B,
            canvases_hw0=tuple(torch.empty(*picture.shape[3:], 0) for picture in pictures),
        )

    def _pictures(self, features: Features, x_t: torch.Tensor) -> list[torch.Tensor]:
        """The latents (B, C, 1, h, w) that become tokens, first the noisy ones."""
        controls = [f"{control}_latents" for control in CONTROLS]
        return [x_t, *(features[name].float() for name in controls if name in features)]

    def guided(self, prompted: torch.Tensor, negative: torch.Tensor, guidance: float) -> torch.Tensor:
        """The usual guidance, after which each token is scaled to its norm in the prediction for the prompt."""
        height, width = prompted.shape[3:]
        moved_BTC = pack(super().guided(prompted, negative, guidance))
        scale_BT1 = pack(prompted).norm(dim=-1, keepdim=True) / moved_BTC.norm(dim=-1, keepdim=True)
        return unpack(moved_BTC * scale_BT1, height, width)

    @cached_property
    def _variant(self) -> Variant:
        named = model_index(self.options.diffusers_path).get("_class_name")
        return VARIANTS[self.options.variant or PIPELINES.get(named, "image")]


def _is_timestep_zero(keys: Iterable[str]) -> bool:
    return any(key.endswith(TIMESTEP_ZERO) for key in keys)
