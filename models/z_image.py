"""Z-Image, Turbo and base: one sequence of picture and text tokens, which are refined separately before.

Pictures and captions are padded to multiples of 32 tokens with learned tokens, which the blocks see; the further
padding of shorter captions in a batch is masked.

Shapes: B batch, T image tokens, L text tokens (both filled up), E rotary frequencies, C channels of a token, D width,
h w latent cells. From the first joined block on, T also counts the text, which follows the picture.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional

from models.base import Features, ModelEncoder
from models.families.pictures import PicturePipeline
from models.foundation.checkpoints.folders import TextPart
from models.foundation.checkpoints.layouts.z_image import BLOCKS, COMFYUI_LAYOUT, PATCH_KEY
from models.foundation.encoders.text_features import ChatFeatures
from models.foundation.layers.axis_tables import AxisTables
from models.foundation.layers.chain import Middle
from models.foundation.layers.padding import filled_length, lengthened
from models.foundation.layers.patches import PATCH, patchify, unpatchify
from utils.diffusion.objectives import FlowMatching
from utils.errors import Problem
from utils.settings.model_schema import ModelSettings
from utils.settings.values import Count

if TYPE_CHECKING:
    from diffusers import ZImageTransformer2DModel

FILLED_TO = 32


class ZImageOptions(ModelSettings):
    """`[model]` of `type = "z_image"`.

    `[sampling] guidance` counts as in diffusers' pipeline of Z-Image: 0 is none, and right for Turbo; for the base
    model 3 to 5. It is one less than the `cfg` of ComfyUI.
    """

    max_sequence_length: Count = 512
    """Number of Qwen3 tokens of a caption that are read, including those of the chat template."""


class ZImageInputs(NamedTuple):
    """The inputs of the entry. `canvas_hw0` has no elements: its shape carries the latent's height and width."""

    x_BTC: torch.Tensor
    positions_BT3: torch.Tensor
    text_BLD: torch.Tensor
    is_caption_BL: torch.Tensor
    text_mask_BL: torch.Tensor | None
    t_B: torch.Tensor
    canvas_hw0: torch.Tensor


class ZImageStream(NamedTuple):
    """What travels from layer to layer. `x_BTD`, its mask (None if all tokens are visible) and its positions belong to
    the picture until the first joined block, which appends those of the text and sets the latter to None."""

    x_BTD: torch.Tensor
    mask_BT: torch.Tensor | None
    positions_BT3: torch.Tensor
    rope_BTE: torch.Tensor
    text_BLD: torch.Tensor | None
    text_mask_BL: torch.Tensor | None
    text_positions_1L3: torch.Tensor | None
    text_rope_1LE: torch.Tensor | None
    time_BD: torch.Tensor
    canvas_hw0: torch.Tensor


class Entry(nn.Module):
    """Embeds tokens, text, time and positions, and inserts the learned padding tokens. Each stage makes the rotary
    tables itself."""

    remakes = ("rope_BTE", "text_rope_1LE")

    def __init__(self, denoiser: ZImageTransformer2DModel):
        super().__init__()
        self.all_x_embedder = denoiser.all_x_embedder
        self.cap_embedder = denoiser.cap_embedder
        self.t_embedder = denoiser.t_embedder
        self.x_pad_token = denoiser.x_pad_token
        self.cap_pad_token = denoiser.cap_pad_token
        self.time_scale = denoiser.t_scale
        # The embedder would create its tables in its first call, on the device of that call.
        rope = denoiser.rope_embedder
        self.rope = AxisTables(rope.precompute_freqs_cis(rope.axes_dims, rope.axes_lens, rope.theta))

    def forward(self, inputs: ZImageInputs) -> ZImageStream:
        dtype, device = self.x_pad_token.dtype, self.x_pad_token.device
        height, width, _ = inputs.canvas_hw0.shape
        x_BTD = self.all_x_embedder[PATCH_KEY](inputs.x_BTC.to(dtype))
        is_picture_T = torch.arange(x_BTD.shape[1], device=device) < (height // PATCH) * (width // PATCH)
        text_BLD = self.cap_embedder(inputs.text_BLD.to(dtype))
        positions_1L1 = torch.arange(1, text_BLD.shape[1] + 1, device=device)[None, :, None]
        text_positions_1L3 = functional.pad(positions_1L1, (0, 2))
        return ZImageStream(
            x_BTD=torch.where(is_picture_T[:, None], x_BTD, self.x_pad_token),
            mask_BT=None,
            positions_BT3=inputs.positions_BT3,
            rope_BTE=self.rope(inputs.positions_BT3),
            text_BLD=torch.where(inputs.is_caption_BL[..., None], text_BLD, self.cap_pad_token),
            text_mask_BL=inputs.text_mask_BL,
            text_positions_1L3=text_positions_1L3,
            text_rope_1LE=self.rope(text_positions_1L3),
            # The time stays float32 until it is embedded.
            time_BD=self.t_embedder(inputs.t_B * self.time_scale).to(dtype),
            canvas_hw0=inputs.canvas_hw0,
        )

    def remake(self, stream: ZImageStream) -> dict[str, Any]:
        """The fields that are not sent from stage to stage."""
        # On a stage without the entry its tables are where they were built.
        rope, text_1L3 = self.rope.to(stream.positions_BT3.device), stream.text_positions_1L3
        return {
            "rope_BTE": rope(stream.positions_BT3),
            "text_rope_1LE": None if text_1L3 is None else rope(text_1L3),
        }


class FirstJoined(Middle):
    """The first block that sees picture and text as one sequence."""

    def forward(self, stream: ZImageStream) -> ZImageStream:
        mask_BT = stream.text_mask_BL
        if mask_BT is not None:
            mask_BT = torch.cat([mask_BT.new_ones(stream.x_BTD.shape[:2]), mask_BT], dim=1)
        positions_BL3 = stream.text_positions_1L3.expand(len(stream.x_BTD), -1, -1)
        joined = stream._replace(
            x_BTD=torch.cat([stream.x_BTD, stream.text_BLD], dim=1),
            mask_BT=mask_BT,
            positions_BT3=torch.cat([stream.positions_BT3, positions_BL3], dim=1),
            rope_BTE=torch.cat([stream.rope_BTE, stream.text_rope_1LE.expand(len(stream.rope_BTE), -1, -1)], dim=1),
            text_BLD=None,
            text_mask_BL=None,
            text_positions_1L3=None,
            text_rope_1LE=None,
        )
        return super().forward(joined)


class Exit(nn.Module):
    """Projects the image tokens to the latent (B, C, h, w)."""

    def __init__(self, denoiser: ZImageTransformer2DModel):
        super().__init__()
        self.all_final_layer = denoiser.all_final_layer

    def forward(self, stream: ZImageStream) -> torch.Tensor:
        height, width, _ = stream.canvas_hw0.shape
        x_BTC = self.all_final_layer[PATCH_KEY](stream.x_BTD, c=stream.time_BD)
        return unpatchify(x_BTC[:, : (height // PATCH) * (width // PATCH)], height, width)


class ZImagePipeline(PicturePipeline):
    """Z-Image of Alibaba's Tongyi Lab: Turbo, which is distilled, and the base model."""

    Options = ZImageOptions
    denoiser_class = "ZImageTransformer2DModel"
    config_keys = ("axes_lens",)
    text_parts = (TextPart("qwen3", "Qwen3Model"),)
    objective = FlowMatching(predicts_data_minus_noise=True, time_is_cleanness=True)
    blocks = BLOCKS
    stream_type = ZImageStream
    original_layout = COMFYUI_LAYOUT
    guided_by_second_prediction = True
    noise_in_float32 = True
    no_guidance = 0.0

    def problems_of_parts(self) -> Iterator[Problem]:
        config, length = self.parts.denoiser_config, self.options.max_sequence_length
        if config.get("siglip_feat_dim") is not None:
            yield self.parts.misfit(
                "this is Z-Image Omni, which takes pictures too and is not trained here; give Z-Image or Z-Image Turbo"
            )
        # The text has the positions from 1 on, and the picture the next one.
        most = (config["axes_lens"][0] - 2) // FILLED_TO * FILLED_TO
        if length > most:
            message = f"{length} tokens are more than this model has positions for; set at most {most}"
            yield Problem("", "[model] max_sequence_length", message)

    @property
    def places(self) -> tuple[int, int]:
        _, rows, columns = self.parts.denoiser_config["axes_lens"]
        return rows, columns

    def encoders(self, controls: int = 0) -> list[ModelEncoder]:
        return [self.autoencoder(), self.parts.text_encoder(ChatFeatures("qwen3", self.options.max_sequence_length))]

    def to_layers(self, denoiser: ZImageTransformer2DModel) -> list[nn.Module]:
        row = {"x": "x_BTD", "attn_mask": "mask_BT", "freqs_cis": "rope_BTE", "adaln_input": "time_BD"}
        text = {"x": "text_BLD", "attn_mask": "text_mask_BL", "freqs_cis": "text_rope_1LE"}
        first, *others = denoiser.layers
        return [
            Entry(denoiser),
            *(Middle(block, row, writes=("x_BTD",)) for block in denoiser.noise_refiner),
            *(Middle(block, text, writes=("text_BLD",)) for block in denoiser.context_refiner),
            FirstJoined(first, row, writes=("x_BTD",)),
            *(Middle(block, row, writes=("x_BTD",)) for block in others),
            Exit(denoiser),
        ]

    def prepare_inputs(
        self, features: Features, x_t: torch.Tensor, t_B: torch.Tensor, guidance: float | None = None
    ) -> ZImageInputs:
        height, width = x_t.shape[2:]
        x_BTC = patchify(x_t)
        lengths_B = features["qwen3_mask"].bool().sum(dim=1)
        filled_B = filled_length(lengths_B, FILLED_TO)
        picture_tokens = filled_length(x_BTC.shape[1], FILLED_TO)
        tokens_L = torch.arange(int(filled_B.max()))
        text_mask_BL = tokens_L < filled_B[:, None]
        return ZImageInputs(
            x_BTC=lengthened(x_BTC, picture_tokens),
            positions_BT3=lengthened(picture_positions(height, width, filled_B + 1), picture_tokens),
            text_BLD=lengthened(features["qwen3"], len(tokens_L)),
            is_caption_BL=tokens_L < lengths_B[:, None],
            text_mask_BL=None if text_mask_BL.all() else text_mask_BL,
            t_B=self.objective.model_time(t_B),
            canvas_hw0=torch.empty(height, width, 0),
        )

    def guided(self, prompted: torch.Tensor, negative: torch.Tensor, guidance: float) -> torch.Tensor:
        """p + g (p - n), as in the stock pipeline."""
        return prompted + guidance * (prompted - negative)


def picture_positions(height: int, width: int, position_B: torch.Tensor) -> torch.Tensor:
    """(position of the picture after its caption, row, column) of every token, int64 (B, T, 3)."""
    rows, columns = torch.arange(height // PATCH), torch.arange(width // PATCH)
    return torch.stack([torch.cartesian_prod(position[None], rows, columns) for position in position_B])
