"""ERNIE-Image: picture and text in one sequence, the picture first; texts of Mistral 3, latents of Flux.2's VAE.

Shapes: B batch, T image tokens, L text tokens, S = T + L, C latent channels, D width, E rotary angles, h w latent
cells. The blocks have the sequence as the first dimension.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from einops import rearrange
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from models.base import Features, ModelEncoder
from models.families.patched_pictures import PatchedPicturePipeline
from models.foundation.encoders.flux2_vae import Flux2Autoencoder
from models.foundation.encoders.mistral import MISTRAL
from models.foundation.encoders.text_features import MaskedHiddenStates
from utils.diffusion.objectives import FlowMatching
from utils.errors import Problem
from utils.settings.model_schema import ModelSettings
from utils.settings.values import Count

if TYPE_CHECKING:
    from diffusers import ErnieImageTransformer2DModel

TRAIN_STEPS = 1000
HIDDEN_STATE = -2
MODULATIONS = 6


class ErnieImageOptions(ModelSettings):
    """`[model]` of `type = "ernie_image"`."""

    max_sequence_length: Count = 512
    """Number of tokens of a caption that are read. Inference reads as many as the tokenizer says, and may let a
    language model write a longer prompt from the user's."""


class ErnieImageInputs(NamedTuple):
    """The inputs of the entry. The mask says which of a row's tokens are its own; None if all are."""

    x_BChw: torch.Tensor
    text_BLD: torch.Tensor
    mask_BS: torch.Tensor | None
    positions_BS3: torch.Tensor
    time_B: torch.Tensor


class ErnieImageStream(NamedTuple):
    """What travels from layer to layer. `canvas_hw0` has no elements: its shape carries the latent's height and
    width."""

    x_SBD: torch.Tensor
    mask_B11S: torch.Tensor | None
    positions_BS3: torch.Tensor
    rope_BS1E: torch.Tensor
    time_BD: torch.Tensor
    modulation_BD: torch.Tensor
    canvas_hw0: torch.Tensor


@dataclass(frozen=True)
class MistralFeatures(MaskedHiddenStates):
    """A hidden state of Mistral for the tokens of each caption, (l, D) with l up to `length`, and a mask (l,) of ones.
    An empty caption is one token: the mark that begins a text, or the first of the vocabulary if there is none."""

    name: ClassVar[str] = "mistral3"
    length: int

    def __call__(self, text_encoder: nn.Module, tokenizer: Any, captions: list[str]) -> dict[str, list[torch.Tensor]]:
        empty = [tokenizer.bos_token_id or 0]
        rows = [tokenizer(caption, max_length=self.length, truncation=True).input_ids or empty for caption in captions]
        # Mistral is causal, so padding behind a caption does not change it.
        tokens_BL = pad_sequence([torch.tensor(row) for row in rows], batch_first=True).to(text_encoder.device)
        hidden_BLD = text_encoder(tokens_BL, output_hidden_states=True, use_cache=False).hidden_states[HIDDEN_STATE]
        return {
            self.name: [hidden[: len(row)] for hidden, row in zip(hidden_BLD, rows, strict=True)],
            f"{self.name}_mask": [torch.ones(len(row), dtype=torch.bool) for row in rows],
        }


class ErnieAutoencoder(Flux2Autoencoder):
    """Flux.2's, normalised as the stock pipeline does, whatever the configuration says."""

    epsilon = 1e-5


class Entry(nn.Module):
    """Embeds picture, text, time and positions, and makes the modulation of all blocks. Each stage makes the rotary
    angles itself."""

    remakes = ("rope_BS1E",)

    def __init__(self, denoiser: ErnieImageTransformer2DModel):
        super().__init__()
        self.x_embedder, self.text_proj = denoiser.x_embedder, denoiser.text_proj
        self.time_proj, self.time_embedding = denoiser.time_proj, denoiser.time_embedding
        self.adaLN_modulation = denoiser.adaLN_modulation
        # Angles are a position times these, which are the angles of 1. The stock module asks the device for autocast,
        # which not all devices know.
        self.register_buffer("frequencies_E", denoiser.pos_embed(torch.ones(1, 1, 3)).flatten(), persistent=False)
        self.widths = denoiser.pos_embed.axes_dim

    def forward(self, inputs: ErnieImageInputs) -> ErnieImageStream:
        dtype = self.x_embedder.proj.weight.dtype
        text_BLD = inputs.text_BLD.to(dtype)
        text_BLD = text_BLD if self.text_proj is None else self.text_proj(text_BLD)
        row_BSD = torch.cat([self.x_embedder(inputs.x_BChw.to(dtype)), text_BLD], dim=1)
        # The time stays float32 until it is embedded.
        time_BD = self.time_embedding(self.time_proj(inputs.time_B).to(dtype))
        return ErnieImageStream(
            x_SBD=row_BSD.transpose(0, 1).contiguous(),
            mask_B11S=None if inputs.mask_BS is None else inputs.mask_BS[:, None, None, :],
            positions_BS3=inputs.positions_BS3,
            rope_BS1E=self._rope(inputs.positions_BS3),
            time_BD=time_BD,
            modulation_BD=self.adaLN_modulation(time_BD),
            canvas_hw0=text_BLD.new_empty(*inputs.x_BChw.shape[2:], 0),
        )

    def remake(self, stream: ErnieImageStream) -> dict[str, Any]:
        """The fields that are not sent from stage to stage."""
        # On a stage without the entry they are where they were built.
        self.frequencies_E = self.frequencies_E.to(stream.positions_BS3.device)
        return {"rope_BS1E": self._rope(stream.positions_BS3)}

    def _rope(self, positions_BS3: torch.Tensor) -> torch.Tensor:
        of_axes = zip(positions_BS3.split(1, dim=-1), self.widths, strict=True)
        positions_BSE = torch.cat([axis.expand(-1, -1, width) for axis, width in of_axes], dim=-1)
        return (positions_BSE * self.frequencies_E).unsqueeze(2)


class Block(nn.Module):
    """A block; the stock module gives it the modulation once for every token, which is as large as 36 activations."""

    recomputable = True

    def __init__(self, block: nn.Module):
        super().__init__()
        self.block = block

    def forward(self, stream: ErnieImageStream) -> ErnieImageStream:
        modulations_1BD = stream.modulation_BD.unsqueeze(0).chunk(MODULATIONS, dim=-1)
        x_SBD = self.block(stream.x_SBD, stream.rope_BS1E, modulations_1BD, stream.mask_B11S)
        return stream._replace(x_SBD=x_SBD)


class Exit(nn.Module):
    """Projects the image tokens to the latent (B, C, h, w)."""

    def __init__(self, denoiser: ErnieImageTransformer2DModel):
        super().__init__()
        self.final_norm, self.final_linear = denoiser.final_norm, denoiser.final_linear

    def forward(self, stream: ErnieImageStream) -> torch.Tensor:
        height, width, _ = stream.canvas_hw0.shape
        x_SBD = self.final_norm(stream.x_SBD, stream.time_BD).type_as(stream.x_SBD)
        return rearrange(self.final_linear(x_SBD)[: height * width], "(h w) b c -> b c h w", h=height)


class ErnieImagePipeline(PatchedPicturePipeline):
    """ERNIE-Image of Baidu."""

    Options = ErnieImageOptions
    denoiser_class = "ErnieImageTransformer2DModel"
    config_keys = ("in_channels", "patch_size", "text_in_dim")
    text_parts = (MISTRAL,)
    objective = FlowMatching(time_scale=TRAIN_STEPS)
    blocks = ("layers",)
    stream_type = ErnieImageStream
    guided_by_second_prediction = True
    autoencoder_class = ErnieAutoencoder

    def problems_of_parts(self) -> Iterator[Problem]:
        config, made = self.parts.denoiser_config, 4 * self.vae_config["latent_channels"]
        ((width,), _) = ([*shape[1:]] for shape in self.encoders()[1].shapes.values())
        if config["patch_size"] != 1:
            yield self.parts.misfit(f"has patches of side {config['patch_size']}; give ERNIE-Image, whose are 1")
        if config["in_channels"] != made:
            yield self.parts.misfit(
                f"takes latents of {config['in_channels']} channels and the VAE makes {made}; give Flux.2's VAE"
            )
        if config["text_in_dim"] != width:
            yield self.parts.misfit(
                f"takes text of {config['text_in_dim']} features and Mistral makes {width}; give Ministral 3 3B"
            )

    def encoders(self, controls: int = 0) -> list[ModelEncoder]:
        return [self.autoencoder(), self.parts.text_encoder(MistralFeatures(self.options.max_sequence_length))]

    def to_layers(self, denoiser: ErnieImageTransformer2DModel) -> list[nn.Module]:
        return [Entry(denoiser), *map(Block, denoiser.layers), Exit(denoiser)]

    def prepare_inputs(
        self, features: Features, x_t: torch.Tensor, t_B: torch.Tensor, guidance: float | None = None
    ) -> ErnieImageInputs:
        height, width = x_t.shape[2:]
        mask_BL = features["mistral3_mask"].bool()
        mask_BS = torch.cat([mask_BL.new_ones(len(x_t), height * width), mask_BL], dim=1)
        return ErnieImageInputs(
            x_BChw=x_t,
            text_BLD=features["mistral3"],
            mask_BS=None if mask_BL.all() else mask_BS,
            positions_BS3=positions(height, width, mask_BL),
            time_B=self.objective.model_time(t_B),
        )

    def sampling_levels(self, steps: int) -> Sequence[float]:
        return [1.0 - index / steps for index in range(steps)]


def positions(height: int, width: int, mask_BL: torch.Tensor) -> torch.Tensor:
    """(length of the text, row, column) of each image token, then (number, 0, 0) of each text token: (B, S, 3)."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    lengths_BT = mask_BL.sum(dim=1, keepdim=True).expand(-1, height * width)
    places_BT2 = torch.stack([rows, columns], dim=-1).reshape(1, -1, 2).expand(len(mask_BL), -1, -1)
    picture_BT3 = torch.cat([lengths_BT.unsqueeze(-1), places_BT2], dim=-1).float()
    numbers_BL = torch.arange(mask_BL.shape[1]).float().expand(len(mask_BL), -1)
    text_BL3 = torch.stack([numbers_BL, *[torch.zeros_like(numbers_BL)] * 2], dim=-1)
    return torch.cat([picture_BT3, text_BL3], dim=1)
