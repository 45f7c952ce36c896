"""Lumina Image 2.0: one row of text and picture tokens, each refined on its own before; texts of Gemma 2.

In a batch each caption is followed directly by its picture, and what pads the shorter rows is masked.

Shapes: B batch, T image tokens, L text tokens, S = L + T tokens of a joined row, E rotary frequencies, C channels of a
token, D width, h w latent cells. The stream's T is S from the first joined block on.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional

from models.base import Features, ModelEncoder
from models.families.pictures import PicturePipeline
from models.foundation.checkpoints.folders import TextPart
from models.foundation.checkpoints.layouts.lumina2 import COMFYUI_LAYOUT
from models.foundation.encoders.text_features import ChatFeatures
from models.foundation.layers.axis_tables import AxisTables
from models.foundation.layers.chain import Middle
from models.foundation.layers.patches import PATCH, patchify, unpatchify
from utils.diffusion.objectives import FlowMatching
from utils.errors import Problem
from utils.settings.model_schema import ModelSettings
from utils.settings.values import Count

if TYPE_CHECKING:
    from diffusers import Lumina2Transformer2DModel

SYSTEM_PROMPT = (
    "You are an assistant designed to generate superior images with the superior degree of image-text alignment based "
    "on textual prompts or user prompts."
)
PROMPT_MARK = " <Prompt Start> "


class Lumina2Options(ModelSettings):
    """`[model]` of `type = "lumina2"`.

    `[sampling] negative_prompt` has the system prompt before it, as prompts have, unless it is empty.
    """

    max_sequence_length: Count = 256
    """Gemma tokens of a caption that are read, those of the system prompt included."""
    system_prompt: str = SYSTEM_PROMPT
    """The text before each caption; an empty caption is read without it. Fine-tuned models may have another one."""


class Lumina2Inputs(NamedTuple):
    """What the entry takes. `text_lengths` are tensors without elements, one per sample: their shapes say how many text
    tokens are the sample's own. The mask is None if no text is padded; the positions of padding are -1."""

    x_BTC: torch.Tensor
    positions_BT3: torch.Tensor
    text_BLD: torch.Tensor
    text_mask_BL: torch.Tensor | None
    text_positions_BL3: torch.Tensor
    text_lengths: tuple[torch.Tensor, ...]
    t_B: torch.Tensor
    canvas_hw0: torch.Tensor


class Lumina2Stream(NamedTuple):
    """What travels from layer to layer. `x_BTD`, its mask (None: all are seen) and its positions are the picture's
    until the first joined block, which puts the text in front of the picture and sets the text's fields to None.
    `canvas_hw0` has no elements: its shape carries the latent's height and width."""

    x_BTD: torch.Tensor
    mask_BT: torch.Tensor | None
    positions_BT3: torch.Tensor
    rope_BTE: torch.Tensor
    text_BLD: torch.Tensor | None
    text_mask_BL: torch.Tensor | None
    text_positions_BL3: torch.Tensor | None
    text_rope_BLE: torch.Tensor | None
    text_lengths: tuple[torch.Tensor, ...]
    time_BD: torch.Tensor
    canvas_hw0: torch.Tensor


@dataclass(frozen=True)
class SystemPromptFeatures(ChatFeatures):
    """`ChatFeatures` of a language model that reads the caption behind a system prompt, without a chat template."""

    system_prompt: str = SYSTEM_PROMPT

    def written(self, tokenizer: Any, caption: str) -> str:
        """The caption behind the system prompt; an empty one alone, as the stock pipeline gives the negative prompt."""
        return self.system_prompt + PROMPT_MARK + caption if caption else caption


class Entry(nn.Module):
    """Embeds tokens, text, time and positions. Each stage makes the rotary tables itself."""

    remakes = ("rope_BTE", "text_rope_BLE")

    def __init__(self, denoiser: Lumina2Transformer2DModel):
        super().__init__()
        # The stock module has zeros for padding.
        self.rope = AxisTables([functional.pad(table, (0, 0, 0, 1)) for table in denoiser.rope_embedder.freqs_cis])
        self.x_embedder = denoiser.x_embedder
        self.time_caption_embed = denoiser.time_caption_embed

    def forward(self, inputs: Lumina2Inputs) -> Lumina2Stream:
        dtype = self.x_embedder.weight.dtype
        x_BTD = self.x_embedder(inputs.x_BTC.to(dtype))
        # The time stays float32 until it is embedded.
        time_BD, text_BLD = self.time_caption_embed(x_BTD, inputs.t_B, inputs.text_BLD.to(dtype))
        return Lumina2Stream(
            x_BTD=x_BTD,
            mask_BT=None,
            positions_BT3=inputs.positions_BT3,
            rope_BTE=self.rope(inputs.positions_BT3),
            text_BLD=text_BLD,
            text_mask_BL=inputs.text_mask_BL,
            text_positions_BL3=inputs.text_positions_BL3,
            text_rope_BLE=self.rope(inputs.text_positions_BL3),
            text_lengths=inputs.text_lengths,
            time_BD=time_BD,
            canvas_hw0=inputs.canvas_hw0,
        )

    def remake(self, stream: Lumina2Stream) -> dict[str, Any]:
        """The fields that are not sent from stage to stage."""
        # On a stage without the entry its tables are where they were built.
        rope, text_BL3 = self.rope.to(stream.positions_BT3.device), stream.text_positions_BL3
        return {
            "rope_BTE": rope(stream.positions_BT3),
            "text_rope_BLE": None if text_BL3 is None else rope(text_BL3),
        }


class FirstJoined(Middle):
    """The first block that sees text and picture in a row."""

    def forward(self, stream: Lumina2Stream) -> Lumina2Stream:
        mask_BT = stream.text_mask_BL
        if mask_BT is not None:
            mask_BT = joined(mask_BT, mask_BT.new_ones(stream.x_BTD.shape[:2]), stream.text_lengths)
        row = stream._replace(
            x_BTD=joined(stream.text_BLD, stream.x_BTD, stream.text_lengths),
            mask_BT=mask_BT,
            positions_BT3=joined(stream.text_positions_BL3, stream.positions_BT3, stream.text_lengths),
            rope_BTE=joined(stream.text_rope_BLE, stream.rope_BTE, stream.text_lengths),
            text_BLD=None,
            text_mask_BL=None,
            text_positions_BL3=None,
            text_rope_BLE=None,
        )
        return super().forward(row)


class Exit(nn.Module):
    """Projects the image tokens to the latent (B, C, h, w)."""

    def __init__(self, denoiser: Lumina2Transformer2DModel):
        super().__init__()
        self.norm_out = denoiser.norm_out

    def forward(self, stream: Lumina2Stream) -> torch.Tensor:
        height, width, _ = stream.canvas_hw0.shape
        tokens = (height // PATCH) * (width // PATCH)
        rows_BSC = self.norm_out(stream.x_BTD, stream.time_BD)
        pictures = [row_SC[len(n) : len(n) + tokens] for row_SC, n in zip(rows_BSC, stream.text_lengths, strict=True)]
        return unpatchify(torch.stack(pictures), height, width)


class Lumina2Pipeline(PicturePipeline):
    """Lumina Image 2.0 of Alpha-VLLM."""

    Options = Lumina2Options
    spec_architecture = "lumina-2"
    denoiser_class = "Lumina2Transformer2DModel"
    config_keys = ("axes_lens", "cap_feat_dim", "in_channels", "patch_size")
    text_parts = (TextPart("gemma2", "Gemma2Model"),)
    objective = FlowMatching(predicts_data_minus_noise=True, time_is_cleanness=True)
    blocks = ("context_refiner", "noise_refiner", "layers")
    stream_type = Lumina2Stream
    original_layout = COMFYUI_LAYOUT
    guided_by_second_prediction = True

    def problems_of_parts(self) -> Iterator[Problem]:
        config, length = self.parts.denoiser_config, self.options.max_sequence_length
        channels, made = config["in_channels"], self.vae_config["latent_channels"]
        width, read = config["cap_feat_dim"], self.parts.text_config("gemma2")["hidden_size"]
        if config["patch_size"] != PATCH:
            yield self.parts.misfit(f"has patches of side {config['patch_size']}; give Lumina Image 2.0, whose are 2")
        if channels != made:
            yield self.parts.misfit(f"takes latents of {channels} channels and the VAE makes {made}; give Flux.1's VAE")
        if width != read:
            yield self.parts.misfit(f"takes text of {width} features and Gemma makes {read}; give Gemma 2 2B")
        # Text has the places from 0 on, and the picture the one after it.
        if length >= config["axes_lens"][0]:
            message = (
                f"{length} tokens are more than this model has places for; set at most {config['axes_lens'][0] - 1}"
            )
            yield Problem("", "[model] max_sequence_length", message)

    @property
    def places(self) -> tuple[int, int]:
        _, rows, columns = self.parts.denoiser_config["axes_lens"]
        return rows, columns

    def encoders(self, controls: int = 0) -> list[ModelEncoder]:
        length, system_prompt = self.options.max_sequence_length, self.options.system_prompt
        features = SystemPromptFeatures("gemma2", length, system_prompt=system_prompt)
        return [self.autoencoder(), self.parts.text_encoder(features)]

    def to_layers(self, denoiser: Lumina2Transformer2DModel) -> list[nn.Module]:
        text = {
            "hidden_states": "text_BLD",
            "attention_mask": "text_mask_BL",
            "image_rotary_emb": "text_rope_BLE",
        }
        row = {
            "hidden_states": "x_BTD",
            "attention_mask": "mask_BT",
            "image_rotary_emb": "rope_BTE",
            "temb": "time_BD",
        }
        first, *others = denoiser.layers
        return [
            Entry(denoiser),
            *(Middle(block, text, writes=("text_BLD",)) for block in denoiser.context_refiner),
            *(Middle(block, row, writes=("x_BTD",)) for block in denoiser.noise_refiner),
            FirstJoined(first, row, writes=("x_BTD",)),
            *(Middle(block, row, writes=("x_BTD",)) for block in others),
            Exit(denoiser),
        ]

    def prepare_inputs(
        self, features: Features, x_t: torch.Tensor, t_B: torch.Tensor, guidance: float | None = None
    ) -> Lumina2Inputs:
        text_mask_BL = features["gemma2_mask"].bool()
        text_BL3, picture_BT3 = positions(text_mask_BL, *(side // PATCH for side in x_t.shape[2:]))
        return Lumina2Inputs(
            x_BTC=patchify(x_t),
            positions_BT3=picture_BT3,
            text_BLD=features["gemma2"],
            text_mask_BL=None if text_mask_BL.all() else text_mask_BL,
            text_positions_BL3=text_BL3,
            text_lengths=tuple(torch.empty(length, 0) for length in text_mask_BL.sum(dim=1).tolist()),
            t_B=self.objective.model_time(t_B),
            canvas_hw0=torch.empty(*x_t.shape[2:], 0),
        )

    def guided(self, prompted: torch.Tensor, negative: torch.Tensor, guidance: float) -> torch.Tensor:
        """n + g (p - n), each row of a latent's channel scaled to the norm that it has in p, as in the stock
        pipeline."""
        guided = super().guided(prompted, negative, guidance)
        return guided * (prompted.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True))


def positions(text_mask_BL: torch.Tensor, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(number, 0, 0) of each text token (B, L, 3), -1 of padding, and (length of the text, row, column) of each image
    token (B, T, 3)."""
    numbers_BL1 = torch.arange(text_mask_BL.shape[1]).expand(len(text_mask_BL), -1).unsqueeze(-1)
    text_BL3 = torch.where(text_mask_BL.unsqueeze(-1), functional.pad(numbers_BL1, (0, 2)), -1)
    grid = torch.arange(rows), torch.arange(columns)
    picture_BT3 = [torch.cartesian_prod(length[None], *grid) for length in text_mask_BL.sum(dim=1)]
    return text_BL3, torch.stack(picture_BT3)


def joined(text_BLD: torch.Tensor, picture_BTD: torch.Tensor, text_lengths: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Of each sample its own text, its picture, and what pads its text: (B, S, ...)."""
    pieces = []
    for text_LD, picture_TD, length in zip(text_BLD, picture_BTD, text_lengths, strict=True):
        own_LD, padding_LD = text_LD.tensor_split([len(length)])
        pieces += [own_LD, picture_TD, padding_LD]
    return torch.cat(pieces).unflatten(0, (len(text_BLD), -1))
