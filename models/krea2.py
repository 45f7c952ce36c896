"""Krea 2: text and picture in one sequence, with the states of twelve layers of Qwen3-VL as text.

Shapes: B batch, T image tokens, L text tokens, S = L + T, C latent channels, K layers of the text encoder, D width,
E rotary angles, h w latent cells.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional

from models.base import Features, ModelEncoder
from models.families.qwen_pictures import QwenPicturePipeline, pack, unpack
from models.foundation.checkpoints.folders import TextPart, model_index
from models.foundation.checkpoints.layouts.krea2 import KREA2_LAYOUT
from models.foundation.encoders.qwen3_vl import Qwen3VLStates
from models.foundation.encoders.qwen_image_prompts import CHAT, DESCRIBE, DESCRIBE_TOKENS
from models.foundation.layers.chain import Middle
from models.foundation.layers.patches import PATCH
from utils.diffusion.timesteps import RESOLUTION_SHIFTS, ResolutionShift
from utils.errors import Problem
from utils.settings.model_schema import ModelSettings
from utils.settings.values import Count

if TYPE_CHECKING:
    from diffusers import Krea2Transformer2DModel

TEXT = "qwen3_vl"
LAYERS = (2, 5, 8, 11, 14, 17, 20, 23, 26, 29, 32, 35)
"""The hidden states that are read, unless the folder's index names others."""
BEFORE, AFTER = CHAT.format(DESCRIBE, "{}").split("{}")
"""The text around a caption."""
AFTER_TOKENS = 5
"""Tokens of the second one, which is never cut off."""
DISTILLED_MU = 1.15
MIB = 2**20


class Krea2Options(ModelSettings):
    """`[model]` of `type = "krea2"`."""

    max_sequence_length: Count = 512
    """Number of Qwen3-VL tokens of a caption that are read, with the five that follow it. The model reads twelve
    layers: the cache takes 60 KB for a token, 31 MB for a caption of 512."""


class Krea2Inputs(NamedTuple):
    """The inputs of the entry. The mask says which of the text's tokens are its own; None if all are."""

    x_BTC: torch.Tensor
    text_BLKD: torch.Tensor
    mask_BL: torch.Tensor | None
    positions_S3: torch.Tensor
    t_B: torch.Tensor
    canvas_hw0: torch.Tensor


class Krea2Stream(NamedTuple):
    """What travels from layer to layer: the text, then the picture. `text_L0` and `canvas_hw0` have no elements: their
    shapes carry the number of text tokens, and the latent's height and width."""

    x_BSD: torch.Tensor
    mask_B11S: torch.Tensor | None
    positions_S3: torch.Tensor
    rope_SE: tuple[torch.Tensor, torch.Tensor]
    time_B1D: torch.Tensor
    modulation_B1D: torch.Tensor
    text_L0: torch.Tensor
    canvas_hw0: torch.Tensor


@dataclass(frozen=True)
class DescribedStates(Qwen3VLStates):
    """`Qwen3VLStates` of a caption that is to be described, of which what follows it is never cut off."""

    skipped: int = DESCRIBE_TOKENS

    def written(self, tokenizer: Any, caption: str) -> str:
        return BEFORE + caption + AFTER

    def row(self, tokenizer: Any, caption: str) -> list[int]:
        cut = tokenizer(BEFORE + caption, max_length=self.length - AFTER_TOKENS, truncation=True).input_ids
        return cut + tokenizer(AFTER).input_ids


@dataclass(frozen=True)
class DistilledShift(ResolutionShift):
    """The same shift for all sizes, as in diffusers' pipeline for the distilled model."""

    @property
    def fitted_to(self) -> None:
        return None

    def mu(self, tokens: int, steps: int = 50) -> float:
        return DISTILLED_MU


class Entry(nn.Module):
    """Embeds tokens, time and positions, and makes one text of the states of all layers. Each stage makes the rotary
    tables itself."""

    remakes = ("rope_SE",)

    def __init__(self, denoiser: Krea2Transformer2DModel):
        super().__init__()
        self.img_in = denoiser.img_in
        self.time_embed, self.time_mod_proj = denoiser.time_embed, denoiser.time_mod_proj
        self.text_fusion, self.txt_in = denoiser.text_fusion, denoiser.txt_in
        self.rotary_emb = denoiser.rotary_emb

    def forward(self, inputs: Krea2Inputs) -> Krea2Stream:
        dtype, mask_BL = self.img_in.weight.dtype, inputs.mask_BL
        # The time stays float32 until it is embedded.
        time_B1D = self.time_embed(inputs.t_B, dtype=dtype)
        text_mask, mask_B11S = None, None
        if mask_BL is not None:
            text_mask = mask_BL[:, None, None, :]
            picture = mask_BL.new_ones(inputs.x_BTC.shape[:2])
            mask_B11S = torch.cat([mask_BL, picture], dim=1)[:, None, None, :]
        text_BLD = self.txt_in(self.text_fusion(inputs.text_BLKD.to(dtype), attention_mask=text_mask))
        return Krea2Stream(
            x_BSD=torch.cat([text_BLD, self.img_in(inputs.x_BTC.to(dtype))], dim=1),
            mask_B11S=mask_B11S,
            positions_S3=inputs.positions_S3,
            rope_SE=self.rotary_emb(inputs.positions_S3),
            time_B1D=time_B1D,
            modulation_B1D=self.time_mod_proj(functional.gelu(time_B1D, approximate="tanh")),
            text_L0=text_BLD.new_empty(text_BLD.shape[1], 0),
            canvas_hw0=inputs.canvas_hw0,
        )

    def remake(self, stream: Krea2Stream) -> dict[str, Any]:
        """The fields that are not sent from stage to stage."""
        return {"rope_SE": self.rotary_emb(stream.positions_S3)}


class Exit(nn.Module):
    """Projects the image tokens to the latent (B, C, 1, h, w)."""

    def __init__(self, denoiser: Krea2Transformer2DModel):
        super().__init__()
        self.final_layer = denoiser.final_layer

    def forward(self, stream: Krea2Stream) -> torch.Tensor:
        height, width, _ = stream.canvas_hw0.shape
        return unpack(self.final_layer(stream.x_BSD[:, len(stream.text_L0) :], stream.time_B1D), height, width)


class Krea2Pipeline(QwenPicturePipeline):
    """Krea 2 of Krea: the base model, and the one that is distilled to fewer steps, as `model_index.json` says.
    `guidance` is Krea's: p + g (p - n), so that 0 is none."""

    Options = Krea2Options
    denoiser_class = "Krea2Transformer2DModel"
    config_keys = ("in_channels", "num_text_layers", "text_hidden_dim")
    text_parts = (TextPart(TEXT, "Qwen3VLModel"),)
    blocks = ("transformer_blocks",)
    stream_type = Krea2Stream
    keep_in_high_precision = ("norm",)
    original_layout = KREA2_LAYOUT
    guided_by_second_prediction = True
    no_guidance = 0.0

    # Kept, as every micro-batch asks for it.
    @cached_property
    def resolution_shift(self) -> ResolutionShift:
        return DistilledShift() if self._index.get("is_distilled") else RESOLUTION_SHIFTS["krea2"]

    @cached_property
    def _index(self) -> dict[str, Any]:
        return model_index(self.options.diffusers_path)

    @property
    def _layers(self) -> tuple[int, ...]:
        return tuple(self._index.get("text_encoder_select_layers") or LAYERS)

    def problems_of_parts(self) -> Iterator[Problem]:
        config, made, layers = self.parts.denoiser_config, PATCH**2 * self._vae_config["z_dim"], self._layers
        encoder = self.encoders()[1]
        text = encoder.config().get_text_config()
        if config["in_channels"] != made:
            yield self.parts.misfit(
                f"takes tokens of {config['in_channels']} numbers and the VAE makes {made}; give Qwen-Image's VAE"
            )
        if config["text_hidden_dim"] != text.hidden_size:
            yield self.parts.misfit(
                f"takes text of {config['text_hidden_dim']} features and Qwen3-VL makes {text.hidden_size}; give "
                "Qwen3-VL 4B"
            )
        if config["num_text_layers"] != len(layers) or max(layers) > text.num_hidden_layers:
            yield self.parts.misfit(
                f"reads {config['num_text_layers']} layers of the text encoder, which has {text.num_hidden_layers}, "
                f"and model_index.json names {', '.join(map(str, layers))}; download the folder again"
            )

    def remarks(self) -> Iterator[tuple[str, str]]:
        yield from super().remarks()
        tokens, width = self.encoders()[1].shapes[TEXT]
        size = tokens * width * self.dtype.itemsize / MIB
        yield "max_sequence_length", f"a caption of as many tokens takes {size:.0f} MiB in the cache"

    def encoders(self, controls: int = 0) -> list[ModelEncoder]:
        length = DESCRIBE_TOKENS + self.options.max_sequence_length
        return [self.autoencoder(), self.parts.text_encoder(DescribedStates(TEXT, length, self._layers))]

    def to_layers(self, denoiser: Krea2Transformer2DModel) -> list[nn.Module]:
        reads = {
            "hidden_states": "x_BSD",
            "temb": "modulation_B1D",
            "image_rotary_emb": "rope_SE",
            "attention_mask": "mask_B11S",
        }
        middles = [Middle(block, reads, writes=("x_BSD",)) for block in denoiser.transformer_blocks]
        return [Entry(denoiser), *middles, Exit(denoiser)]

    def prepare_inputs(
        self, features: Features, x_t: torch.Tensor, t_B: torch.Tensor, guidance: float | None = None
    ) -> Krea2Inputs:
        text_BLF, mask_BL = features[TEXT], features[f"{TEXT}_mask"].bool()
        height, width = x_t.shape[3:]
        return Krea2Inputs(
            x_BTC=pack(x_t),
            text_BLKD=text_BLF.unflatten(-1, (self.parts.denoiser_config["num_text_layers"], -1)),
            mask_BL=None if mask_BL.all() else mask_BL,
            positions_S3=positions(text_BLF.shape[1], height // PATCH, width // PATCH),
            t_B=t_B,
            canvas_hw0=torch.empty(height, width, 0),
        )

    def guided(self, prompted: torch.Tensor, negative: torch.Tensor, guidance: float) -> torch.Tensor:
        """p + g (p - n), as in the stock pipeline."""
        return prompted + guidance * (prompted - negative)


def positions(text: int, rows: int, columns: int) -> torch.Tensor:
    """(0, 0, 0) of each text token, then (0, row, column) of each image token: (S, 3)."""
    grid = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    picture_T3 = torch.stack([torch.zeros(rows, columns), *grid], dim=-1).reshape(-1, 3)
    return torch.cat([torch.zeros(text, 3), picture_T3])
