"""CogView4: a transformer in which picture and text share the weights, with GLM-4 as text encoder.

The model receives the time before the shift by the picture's size: at noise level t of a picture with shift s, the u
with t = s u / (1 + (s - 1) u).

Shapes: B batch, T image tokens, L text tokens, C latent channels, D width, E rotary features, h w latent cells.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from models.base import Features, ModelEncoder
from models.families.pictures import PicturePipeline
from models.foundation.checkpoints.folders import TextPart
from models.foundation.encoders.text_features import Shapes, TextFeatures
from models.foundation.layers.chain import Middle
from models.foundation.layers.padding import filled_length
from models.foundation.layers.patches import PATCH, unpack
from utils.diffusion.objectives import FlowMatching
from utils.diffusion.timesteps import ResolutionShift, shift_by_factor
from utils.errors import Problem
from utils.settings.model_schema import ModelSettings
from utils.settings.values import Count

if TYPE_CHECKING:
    from diffusers import CogView4Transformer2DModel
    from transformers import PretrainedConfig

TRAIN_STEPS = 1000
FILLED_TO = 16
"""Captions begin with padding up to a multiple of this many tokens, which the text encoder and the transformer see."""
HIDDEN_STATE = -2
ROTARY_GRID = (256, 256)
"""Rows and columns over which positions of every picture are spread, unless the configuration has others."""

Rope = tuple[torch.Tensor, torch.Tensor]
"""Cosines and sines."""


class CogView4Options(ModelSettings):
    """`[model]` of `type = "cogview4"`.

    `flux_shift = true` shifts by the picture's size as CogView4's own training does: by 0.25 + 0.75 sqrt(tokens / 256),
    which is 3.25 for 1024 x 1024 pixels; that training draws timesteps by the method `uniform`.
    """

    max_sequence_length: Count = 1024
    """Number of GLM-4 tokens of a caption that are read."""


class CogView4Inputs(NamedTuple):
    """The inputs of the entry. `text_lengths` are tensors without elements, one per sample, whose shapes say how many
    of its tokens are its own; None if all are. Rotary tables are those of the rows and of the columns of tokens."""

    x_BChw: torch.Tensor
    text_BLD: torch.Tensor
    text_lengths: tuple[torch.Tensor, ...] | None
    time_B: torch.Tensor
    size_B2: torch.Tensor
    rows_hE: Rope
    columns_wE: Rope


class CogView4Stream(NamedTuple):
    """What travels from layer to layer. `canvas_hw0` has no elements: its shape carries the latent's height and
    width."""

    x_BTD: torch.Tensor
    text_BLD: torch.Tensor
    text_lengths: tuple[torch.Tensor, ...] | None
    time_BD: torch.Tensor
    rows_hE: Rope
    columns_wE: Rope
    rope_TE: Rope
    canvas_hw0: torch.Tensor


@dataclass(frozen=True)
class GlmFeatures(TextFeatures):
    """A hidden state of GLM (l, D) for each caption with its padding, and a mask (l,) of ones."""

    name: ClassVar[str] = "glm"
    length: int

    def shapes(self, config: PretrainedConfig) -> Shapes:
        filled = filled_length(self.length, FILLED_TO)
        return {"glm": (filled, config.hidden_size), "glm_mask": (filled,)}

    def __call__(self, text_encoder: nn.Module, tokenizer: Any, captions: list[str]) -> dict[str, list[torch.Tensor]]:
        padding = [tokenizer.pad_token_id]
        rows = [tokenizer(caption, max_length=self.length, truncation=True).input_ids for caption in captions]
        rows = [padding * (filled_length(len(row), FILLED_TO) - len(row)) + row for row in rows]
        # GLM is causal, so padding behind a caption does not change it.
        longest = max(len(row) for row in rows)
        tokens_BL = torch.tensor([row + padding * (longest - len(row)) for row in rows], device=text_encoder.device)
        hidden_BLD = text_encoder(tokens_BL, output_hidden_states=True).hidden_states[HIDDEN_STATE]
        return {
            "glm": [hidden[: len(row)] for hidden, row in zip(hidden_BLD, rows, strict=True)],
            "glm_mask": [torch.ones(len(row), dtype=torch.bool) for row in rows],
        }


class RootShift(ResolutionShift):
    """s, linear in the root of the number of image tokens (`calculate_shift` of diffusers' CogView4 pipeline)."""

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> RootShift:
        """The shift of a scheduler's configuration."""
        return cls(config["base_image_seq_len"], config["max_image_seq_len"], config["base_shift"], config["max_shift"])

    def factor(self, tokens: int) -> float:
        return self.base_shift + self.max_shift * math.sqrt(tokens / self.base_tokens)

    def mu(self, tokens: int, steps: int = 50) -> float:
        """s itself, which a scheduler with a linear `time_shift_type` takes."""
        return self.factor(tokens)


class OwnTextAttention:
    """The stock attention for each sample with its own text, without the padding of shorter texts in a batch.

    The mask of the stock processor hides nothing: it adds 1 to the scores of visible tokens and 0 to the others.

    Args:
        stock: the stock processor.
    """

    def __init__(self, stock: Callable[..., tuple[torch.Tensor, torch.Tensor]]):
        self.stock = stock

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: tuple[torch.Tensor, ...] | None = None,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Picture (B, T, D) and text (B, L, D); `attention_mask` is `text_lengths` of the stream."""
        if attention_mask is None:
            return self.stock(attn, hidden_states, encoder_hidden_states, image_rotary_emb=image_rotary_emb)
        pictures, texts = [], []
        for number, length in enumerate(attention_mask):
            own, added = encoder_hidden_states[number : number + 1].tensor_split([len(length)], dim=1)
            picture, text = self.stock(attn, hidden_states[number : number + 1], own, image_rotary_emb=image_rotary_emb)
            pictures.append(picture)
            texts.append(functional.pad(text, (0, 0, 0, added.shape[1])))
        return torch.cat(pictures), torch.cat(texts)


class Entry(nn.Module):
    """Embeds patches and text, and the time with the picture's size. Each stage makes the rotary tables of all tokens
    itself."""

    remakes = ("rope_TE",)

    def __init__(self, denoiser: CogView4Transformer2DModel):
        super().__init__()
        self.patch_embed = denoiser.patch_embed
        self.time_condition_embed = denoiser.time_condition_embed

    def forward(self, inputs: CogView4Inputs) -> CogView4Stream:
        dtype = self.patch_embed.proj.weight.dtype
        x_BTD, text_BLD = self.patch_embed(inputs.x_BChw.to(dtype), inputs.text_BLD.to(dtype))
        # Training treats pictures as if they had never been larger or cropped. The time stays float32 until it is
        # embedded.
        sizes = inputs.size_B2, inputs.size_B2, torch.zeros_like(inputs.size_B2)
        return CogView4Stream(
            x_BTD=x_BTD,
            text_BLD=text_BLD,
            text_lengths=inputs.text_lengths,
            time_BD=functional.silu(self.time_condition_embed(inputs.time_B, *sizes, dtype)),
            rows_hE=inputs.rows_hE,
            columns_wE=inputs.columns_wE,
            rope_TE=of_grid(inputs.rows_hE, inputs.columns_wE),
            canvas_hw0=x_BTD.new_empty(*inputs.x_BChw.shape[2:], 0),
        )

    def remake(self, stream: CogView4Stream) -> dict[str, Any]:
        """The fields that are not sent from stage to stage."""
        return {"rope_TE": of_grid(stream.rows_hE, stream.columns_wE)}


def of_grid(rows_hE: Rope, columns_wE: Rope) -> Rope:
    """The tables (T, E) of a grid of tokens, whose rows and columns have every other quarter of the angles."""
    tables = []
    for rows, columns in zip(rows_hE, columns_wE, strict=True):
        of_row, of_column = torch.broadcast_tensors(rows.unsqueeze(1), columns.unsqueeze(0))
        (first, _, third, _), (_, second, _, fourth) = of_row.chunk(4, dim=-1), of_column.chunk(4, dim=-1)
        tables.append(torch.cat([first, second, third, fourth], dim=-1).flatten(0, 1))
    cosines, sines = tables
    return cosines, sines


class Exit(nn.Module):
    """Projects the image tokens to the latent (B, C, h, w)."""

    def __init__(self, denoiser: CogView4Transformer2DModel):
        super().__init__()
        self.norm_out = denoiser.norm_out
        self.proj_out = denoiser.proj_out

    def forward(self, stream: CogView4Stream) -> torch.Tensor:
        height, width, _ = stream.canvas_hw0.shape
        return unpack(self.proj_out(self.norm_out(stream.x_BTD, stream.time_BD)), height, width)


class CogView4Pipeline(PicturePipeline):
    """CogView4 of Zhipu AI, which reads Chinese and English."""

    Options = CogView4Options
    denoiser_class = "CogView4Transformer2DModel"
    config_keys = ("attention_head_dim", "in_channels", "text_embed_dim")
    text_parts = (TextPart("glm", "GlmModel"),)
    objective = FlowMatching(time_scale=TRAIN_STEPS)
    blocks = ("transformer_blocks",)
    stream_type = CogView4Stream
    guided_by_second_prediction = True
    noise_in_float32 = True

    # Kept, as every micro-batch asks for it.
    @cached_property
    def resolution_shift(self) -> RootShift:
        return RootShift.from_config(self.scheduler().config)

    def problems_of_parts(self) -> Iterator[Problem]:
        config, shift = self.parts.denoiser_config, self.scheduler().config
        channels, made = config["in_channels"], self.vae_config["latent_channels"]
        width, read = config["text_embed_dim"], self.parts.text_config("glm")["hidden_size"]
        if channels == 2 * made:
            yield self.parts.misfit("is CogView4 Control, which is not trained here; give CogView4")
        elif channels != made:
            yield self.parts.misfit(
                f"takes latents of {channels} channels and the VAE makes {made}; give CogView4's own VAE"
            )
        if width != read:
            yield self.parts.misfit(f"takes text of {width} features and GLM makes {read}; give GLM-4 9B")
        if not shift.use_dynamic_shifting or shift.time_shift_type != "linear":
            yield Problem(
                str(self.options.diffusers_path / "scheduler" / "scheduler_config.json"),
                "",
                "does not shift linearly by the picture's size, as CogView4's does; download it again",
            )

    def encoders(self, controls: int = 0) -> list[ModelEncoder]:
        return [self.autoencoder(), self.parts.text_encoder(GlmFeatures(self.options.max_sequence_length))]

    def build_denoiser(self) -> CogView4Transformer2DModel:
        return attending_to_own_text(super().build_denoiser())

    def to_layers(self, denoiser: CogView4Transformer2DModel) -> list[nn.Module]:
        reads = {
            "hidden_states": "x_BTD",
            "encoder_hidden_states": "text_BLD",
            "temb": "time_BD",
            "image_rotary_emb": "rope_TE",
            "attention_mask": "text_lengths",
        }
        middles = [Middle(block, reads, writes=("x_BTD", "text_BLD")) for block in denoiser.transformer_blocks]
        return [Entry(denoiser), *middles, Exit(denoiser)]

    def prepare_inputs(
        self, features: Features, x_t: torch.Tensor, t_B: torch.Tensor, guidance: float | None = None
    ) -> CogView4Inputs:
        from diffusers.models.transformers.transformer_cogview4 import CogView4RotaryPosEmbed

        config, text_BLD = self.parts.denoiser_config, features["glm"]
        height, width = (side * self.cell for side in x_t.shape[2:])
        lengths = features["glm_mask"].sum(dim=1).tolist()
        shift = self.resolution_shift.factor(self.tokens(x_t.shape[1:]))
        rope = CogView4RotaryPosEmbed(config["attention_head_dim"], PATCH, config.get("rope_axes_dim", ROTARY_GRID))
        return CogView4Inputs(
            x_BChw=x_t,
            text_BLD=text_BLD,
            text_lengths=tuple(torch.empty(n, 0) for n in lengths) if min(lengths) < text_BLD.shape[1] else None,
            time_B=self.objective.model_time(shift_by_factor(t_B, 1.0 / shift)),
            size_B2=torch.tensor([[height, width]], dtype=torch.float32).repeat(len(x_t), 1),
            rows_hE=rope(x_t[..., :PATCH]),
            columns_wE=rope(x_t[..., :PATCH, :]),
        )

    def sampling_levels(self, steps: int) -> Sequence[float]:
        """Integer steps out of a thousand, evenly spaced from the first to the last."""
        return (np.linspace(TRAIN_STEPS, 1, steps).astype(int) / TRAIN_STEPS).tolist()


def attending_to_own_text(denoiser: CogView4Transformer2DModel) -> CogView4Transformer2DModel:
    """The denoiser, whose blocks take `text_lengths` as their `attention_mask`."""
    for block in denoiser.transformer_blocks:
        block.attn1.set_processor(OwnTextAttention(block.attn1.processor))
    return denoiser
