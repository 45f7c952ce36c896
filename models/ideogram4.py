"""Ideogram 4: text and picture in one sequence, with the outputs of thirteen layers of Qwen3-VL as text.

Shapes: B batch, T image tokens, L text tokens, S = L + T, C latent channels, D width, F text features, A width of the
modulation, E rotary angles, H half of them, h w latent cells.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from einops import rearrange
from torch import nn
from torch.nn import functional

from models.base import Features, ModelEncoder
from models.families.patched_pictures import PatchedPicturePipeline
from models.foundation.checkpoints.folders import TextPart
from models.foundation.checkpoints.layouts.ideogram4 import IDEOGRAM4_LAYOUT
from models.foundation.encoders.ideogram4_vae import MEAN, IdeogramAutoencoder
from models.foundation.encoders.qwen3_vl import Qwen3VLStates
from models.foundation.encoders.text_features import chat
from models.foundation.layers.chain import Middle, capture_outputs
from models.foundation.layers.logit_normal_steps import LogitNormalSteps
from utils.diffusion.objectives import FlowMatching
from utils.diffusion.timesteps import ResolutionShift
from utils.errors import Problem
from utils.settings.model_schema import ModelSettings
from utils.settings.values import Count

if TYPE_CHECKING:
    from diffusers import Ideogram4Transformer2DModel

TEXT = "qwen3_vl"
LAYERS = (0, 3, 6, 9, 12, 15, 18, 21, 24, 27, 30, 33, 35)
PICTURE_PLACE = 65536
"""The position of a picture's first row and column, and of all of it in time: no text is as long."""
UNSHIFTED_TOKENS = 1024
"""Image tokens of a picture whose noise levels are not shifted, of 512 x 512."""
TIME_SCALE = 1e4
MIB = 2**20


class Ideogram4Options(ModelSettings):
    """`[model]` of `type = "ideogram4"`.

    `flux_shift = true` shifts by the picture's size as samples are: by the square root of its share of 512 x 512
    pixels, which is 2 for 1024 x 1024. With `timestep_sample_method = "logit_normal"` and `sigmoid_scale = 1.5` noise
    levels are drawn as the steps of samples lie.
    """

    max_sequence_length: Count = 2048
    """Number of Qwen3-VL tokens of a caption that are read, with those of the chat around it. Ideogram's own captions
    are JSON. The model reads thirteen layers: the cache takes 106 KB for a token, 21 MB for a caption of 200."""


class Ideogram4Inputs(NamedTuple):
    """The inputs of the entry. Texts end where the picture begins: what pads them is in front. The mask says which of
    the text's tokens are its own; None if all are."""

    x_BTC: torch.Tensor
    text_BLF: torch.Tensor
    mask_BL: torch.Tensor | None
    positions_BS3: torch.Tensor
    t_B: torch.Tensor
    canvas_hw0: torch.Tensor


class Ideogram4Stream(NamedTuple):
    """What travels from layer to layer: the text, then the picture. `canvas_hw0` has no elements: its shape carries the
    latent's height and width."""

    x_BSD: torch.Tensor
    mask_B11S: torch.Tensor | None
    positions_BS3: torch.Tensor
    rope_BSE: tuple[torch.Tensor, torch.Tensor]
    time_B1A: torch.Tensor
    canvas_hw0: torch.Tensor


@dataclass(frozen=True)
class LayerOutputs(Qwen3VLStates):
    """What layers give, before the last norm, for a caption as a user's message; the numbers of the layers for one
    feature follow one another."""

    def written(self, tokenizer: Any, caption: str) -> str:
        message = [{"type": "text", "text": caption}]
        return chat(tokenizer, [("user", message)], add_generation_prompt=True)

    def states(self, text_encoder: nn.Module, tokens_BL: torch.Tensor) -> Sequence[torch.Tensor]:
        read = [text_encoder.language_model.layers[layer] for layer in self.layers]
        with capture_outputs(read, lambda layer, given, state_BLD: state_BLD) as states:
            text_encoder(tokens_BL, use_cache=False)
        return states

    def joined(self, states: Sequence[torch.Tensor]) -> torch.Tensor:
        return rearrange(list(states), "k b l d -> b l (d k)")


class Entry(nn.Module):
    """Embeds text, picture, time and positions. Each stage makes the rotary tables itself."""

    remakes = ("rope_BSE",)

    def __init__(self, denoiser: Ideogram4Transformer2DModel):
        super().__init__()
        self.input_proj, self.embed_image_indicator = denoiser.input_proj, denoiser.embed_image_indicator
        self.llm_cond_norm, self.llm_cond_proj = denoiser.llm_cond_norm, denoiser.llm_cond_proj
        self.t_embedding, self.adaln_proj = denoiser.t_embedding, denoiser.adaln_proj
        self.rotary_emb = denoiser.rotary_emb

    def forward(self, inputs: Ideogram4Inputs) -> Ideogram4Stream:
        dtype, mask_BL = self.input_proj.weight.dtype, inputs.mask_BL
        picture_BTD = self.input_proj(inputs.x_BTC.to(dtype))
        text_BLD = self.llm_cond_proj(self.llm_cond_norm(inputs.text_BLF.to(dtype)))
        is_picture_BT = torch.ones(picture_BTD.shape[:2], dtype=torch.int64, device=picture_BTD.device)
        mask_B11S = None
        if mask_BL is not None:
            text_BLD = text_BLD * mask_BL.unsqueeze(-1).to(dtype)
            mask_B11S = torch.cat([mask_BL, is_picture_BT.bool()], dim=1)[:, None, None, :]
        is_picture_BS = torch.cat([is_picture_BT.new_zeros(text_BLD.shape[:2]), is_picture_BT], dim=1)
        return Ideogram4Stream(
            x_BSD=torch.cat([text_BLD, picture_BTD], dim=1) + self.embed_image_indicator(is_picture_BS),
            mask_B11S=mask_B11S,
            positions_BS3=inputs.positions_BS3,
            rope_BSE=self._rope(inputs.positions_BS3, dtype),
            time_B1A=functional.silu(self.adaln_proj(self._time(inputs.t_B, dtype).unsqueeze(1))),
            canvas_hw0=inputs.canvas_hw0,
        )

    def remake(self, stream: Ideogram4Stream) -> dict[str, Any]:
        """The fields that are not sent from stage to stage."""
        return {"rope_BSE": self._rope(stream.positions_BS3, stream.x_BSD.dtype)}

    def _rope(self, positions_BS3: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines. The stock module, which does the same, makes the angles by a product of matrices, which
        GPUs may round, and asks the device for autocast, which not all devices know."""
        rope, positions_BS3 = self.rotary_emb, positions_BS3.float()
        # On a stage without the entry they are where they were built.
        frequencies_H = rope.to(positions_BS3.device).inv_freq
        angles_BSH = positions_BS3[..., :1] * frequencies_H
        for axis in (1, 2):
            own = slice(axis, 3 * rope.mrope_section[axis], 3)
            angles_BSH[..., own] = positions_BS3[..., axis, None] * frequencies_H[own]
        angles_BSE = torch.cat([angles_BSH, angles_BSH], dim=-1)
        return angles_BSE.cos().to(dtype), angles_BSE.sin().to(dtype)

    def _time(self, t_B: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The embedded time. The stock module, which does the same, takes a time in the type of its weights, which may
        not tell one step from the next."""
        from diffusers.models.transformers.transformer_ideogram4 import _sinusoidal_embedding

        embed = self.t_embedding
        scaled_B = TIME_SCALE * (t_B.float() - embed.range_min) / (embed.range_max - embed.range_min)
        waves_BD = _sinusoidal_embedding(scaled_B, embed.dim).to(dtype)
        return embed.mlp_out(functional.silu(embed.mlp_in(waves_BD)))


class Exit(nn.Module):
    """Projects the image tokens to the latent (B, C, h, w)."""

    def __init__(self, denoiser: Ideogram4Transformer2DModel):
        super().__init__()
        self.final_layer = denoiser.final_layer

    def forward(self, stream: Ideogram4Stream) -> torch.Tensor:
        height, width, _ = stream.canvas_hw0.shape
        x_BSC = self.final_layer(stream.x_BSD, conditioning=stream.time_B1A)
        return rearrange(x_BSC[:, -height * width :], "b (h w) c -> b c h w", h=height)


@dataclass(frozen=True)
class AreaShift(ResolutionShift):
    """The root of the share of 512 x 512 pixels (`_resolution_aware_mu` of diffusers' Ideogram 4 pipeline)."""

    @property
    def fitted_to(self) -> None:
        return None

    def mu(self, tokens: int, steps: int = 50) -> float:
        return 0.5 * math.log(tokens / UNSHIFTED_TOKENS)


class Ideogram4Pipeline(PatchedPicturePipeline):
    """Ideogram 4 of Ideogram. Inference guides by a second transformer, which knows no text and is not trained, nor
    loaded for samples: these are drawn without guidance (`guidance = 1`)."""

    Options = Ideogram4Options
    denoiser_class = "Ideogram4Transformer2DModel"
    noise_in_float32 = True
    config_keys = ("in_channels", "llm_features_dim")
    text_parts = (TextPart(TEXT, "Qwen3VLModel"),)
    objective = FlowMatching(predicts_data_minus_noise=True, time_is_cleanness=True)
    blocks = ("layers",)
    stream_type = Ideogram4Stream
    resolution_shift = AreaShift()
    original_layout = IDEOGRAM4_LAYOUT
    scheduler_sets_levels = True
    unguided = (
        "is by a second transformer, which is not loaded here; set guidance = 1, with which samples are drawn without"
    )
    autoencoder_class = IdeogramAutoencoder

    def problems_of_parts(self) -> Iterator[Problem]:
        config, made = self.parts.denoiser_config, 4 * self.vae_config["latent_channels"]
        encoder = self.encoders()[1]
        ((width,), _) = ([*shape[1:]] for shape in encoder.shapes.values())
        layers = encoder.config().get_text_config().num_hidden_layers
        if config["in_channels"] != made:
            yield self.parts.misfit(
                f"takes latents of {config['in_channels']} channels and the VAE makes {made}; give Ideogram 4's VAE"
            )
        if config["llm_features_dim"] != width or layers <= max(LAYERS):
            yield self.parts.misfit(
                f"takes text of {config['llm_features_dim']} features, and {len(LAYERS)} of the {layers} layers of "
                f"Qwen3-VL make {width}; give Qwen3-VL 8B"
            )
        if self.options.vae_path is not None and made != len(MEAN):
            message = f"makes latents of {made} channels; give Ideogram 4's VAE or Flux.2's, of {len(MEAN)}"
            yield Problem("", "[model] vae_path", message)

    def remarks(self) -> Iterator[tuple[str, str]]:
        yield from super().remarks()
        tokens, width = self.encoders()[1].shapes[TEXT]
        size = tokens * width * self.dtype.itemsize / MIB
        yield "max_sequence_length", f"a caption of as many tokens takes {size:.0f} MiB in the cache"

    def encoders(self, controls: int = 0) -> list[ModelEncoder]:
        features = LayerOutputs(TEXT, self.options.max_sequence_length, LAYERS)
        return [self.autoencoder(), self.parts.text_encoder(features)]

    def scheduler(self) -> LogitNormalSteps:
        return LogitNormalSteps(super().scheduler())

    def to_layers(self, denoiser: Ideogram4Transformer2DModel) -> list[nn.Module]:
        reads = {
            "hidden_states": "x_BSD",
            "attention_mask": "mask_B11S",
            "image_rotary_emb": "rope_BSE",
            "adaln_input": "time_B1A",
        }
        return [Entry(denoiser), *(Middle(one, reads, writes=("x_BSD",)) for one in denoiser.layers), Exit(denoiser)]

    def prepare_inputs(
        self, features: Features, x_t: torch.Tensor, t_B: torch.Tensor, guidance: float | None = None
    ) -> Ideogram4Inputs:
        mask_BL, (height, width) = features[f"{TEXT}_mask"].bool(), x_t.shape[2:]
        lengths, longest = mask_BL.sum(dim=1).tolist(), mask_BL.shape[1]
        text_BLF, mask_BL = (at_the_end(one, lengths) for one in (features[TEXT], mask_BL))
        return Ideogram4Inputs(
            x_BTC=rearrange(x_t, "b c h w -> b (h w) c"),
            text_BLF=text_BLF,
            mask_BL=None if mask_BL.all() else mask_BL,
            positions_BS3=positions(lengths, longest, height, width),
            t_B=self.objective.model_time(t_B),
            canvas_hw0=torch.empty(height, width, 0),
        )


def at_the_end(rows_BL: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    """Rows (B, L, ...), of which the first `lengths` are moved to the end."""
    return torch.stack([row.roll(len(row) - length, 0) for row, length in zip(rows_BL, lengths, strict=True)])


def positions(lengths: Sequence[int], longest: int, rows: int, columns: int) -> torch.Tensor:
    """The number, three times, of each text token at the end of `longest`, then (0, row, column) of each image token,
    all from `PICTURE_PLACE` on: int64 (B, S, 3)."""
    grid = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    picture_T3 = torch.stack([torch.zeros(rows, columns, dtype=torch.int64), *grid], dim=-1).reshape(-1, 3)
    numbers_BL = torch.stack([torch.arange(longest) - longest + length for length in lengths]).clamp(min=0)
    text_BL3 = numbers_BL.unsqueeze(-1).expand(-1, -1, 3)
    return torch.cat([text_BL3, (picture_T3 + PICTURE_PLACE).expand(len(lengths), -1, -1)], dim=1)
