"""Qwen-Image 2.1: text and picture in one sequence, in which text sees what precedes it, and the picture all.

Shapes: B batch, T image tokens, L text tokens, S = L + T, C latent channels, D width, H heads, E rotary angles, R rows
of time embedding, h w latent cells.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from einops import rearrange
from torch import nn

from models.base import BasePipeline, Features, ModelEncoder
from models.foundation.checkpoints.configs import stock_scheduler
from models.foundation.checkpoints.folders import TextPart, model_index
from models.foundation.checkpoints.layouts.qwen_image_21 import QWEN_21_LAYOUT
from models.foundation.encoders.qwen3_vl import Qwen3VLStates
from models.foundation.encoders.video_vae import QWEN_IMAGE_21, QwenImage21Autoencoder, latent_size
from models.foundation.layers.chain import capture_outputs
from models.foundation.layers.padding import without
from utils.dataset.buckets import MediaFacts
from utils.diffusion.timesteps import ResolutionShift
from utils.errors import Problem
from utils.settings.model_schema import ModelSettings
from utils.settings.values import Count

if TYPE_CHECKING:
    from diffusers import FlowMatchEulerDiscreteScheduler, QwenImage21Transformer2DModel
    from diffusers.models.transformers.transformer_qwenimage21 import QwenImage21Rope

TEXT = "qwen3_vl"
SYSTEM = "<|im_start|>system\nComprehend and analyze the provided prompt.<|im_end|>\n"
USER = "<|im_start|>user\n"
ASSISTANT = "<|im_end|>\n<|im_start|>assistant\n"
ROPE_BASE = 10000
SHIFT_KEYS = {
    "base_tokens": "base_image_seq_len",
    "max_tokens": "max_image_seq_len",
    "base_shift": "base_shift",
    "max_shift": "max_shift",
}
"""What the constants of the shift are called in a scheduler's configuration."""


class QwenImage21Options(ModelSettings):
    """`[model]` of `type = "qwen_image_21"`."""

    max_sequence_length: Count = 1024
    """Number of tokens that are read of a caption with the words around it; inference reads all."""


@dataclass(frozen=True)
class Caption(Qwen3VLStates):
    """What the last layer gives for the tokens of a caption in the model's template, and the mask; without those of the
    system message, and before the text model's last norm, which the last of transformers' hidden states have behind
    them. An empty caption is a space, as in the stock pipeline; of one that is too long the last words are left out,
    not what stands behind it."""

    layers: tuple[int, ...] = (-1,)

    def written(self, tokenizer: Any, caption: str) -> str:
        return f"{SYSTEM}{USER}{caption or ' '}{ASSISTANT}"

    def row(self, tokenizer: Any, caption: str) -> list[int]:
        row = tokenizer(self.written(tokenizer, caption)).input_ids
        behind = len(tokenizer(ASSISTANT).input_ids)
        return row if len(row) <= self.length else row[: self.length - behind] + row[-behind:]

    def states(self, text_encoder: nn.Module, tokens_BL: torch.Tensor) -> Sequence[torch.Tensor]:
        last = text_encoder.language_model.layers[-1]
        with capture_outputs([last], lambda module, given, made: made) as captured:
            text_encoder(tokens_BL, use_cache=False)
        return captured

    def __call__(self, text_encoder: nn.Module, tokenizer: Any, captions: list[str]) -> dict[str, list[torch.Tensor]]:
        # As many as the tokenizer makes of it; it ends with a token of its own.
        skipped = len(tokenizer(SYSTEM).input_ids)
        made = super().__call__(text_encoder, tokenizer, captions)
        return {name: [row[skipped:] for row in rows] for name, rows in made.items()}


class QwenImage21Inputs(NamedTuple):
    """The inputs of the entry. `text_lengths` are tensors without elements, whose length is the number of a sample's
    own tokens; None if no text is padded. The angles are those of each sample, or the same for all."""

    x_BCfhw: torch.Tensor
    text_BLD: torch.Tensor
    text_lengths: tuple[torch.Tensor, ...] | None
    t_B: torch.Tensor
    rope_BSE: torch.Tensor


class QwenImage21Stream(NamedTuple):
    """What travels from layer to layer. With `causal_condition` the last row of times is that of the text, which is
    free of noise: R = B + 1. `canvas_hw0` has no elements: its shape carries the latent's height and width."""

    x_BSD: torch.Tensor
    text_lengths: tuple[torch.Tensor, ...] | None
    time_RD: torch.Tensor
    modulation_RD: torch.Tensor
    rope_BSE: torch.Tensor
    canvas_hw0: torch.Tensor

    @property
    def text_tokens(self) -> int:
        """The number of text tokens, with padding."""
        height, width, _ = self.canvas_hw0.shape
        return self.x_BSD.shape[1] - height * width


class Rows(NamedTuple):
    """What attention is told of a stream; see there."""

    text_tokens: int
    text_lengths: tuple[torch.Tensor, ...] | None


class OwnTextAttention:
    """The stock attention of text before a picture, where each sample has angles of its own, and its picture sees its
    own text without the padding of shorter texts in a batch. No kernel needs a mask for that."""

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self, attn: nn.Module, hidden_states: torch.Tensor, rotary_emb: torch.Tensor, segments: Rows, **unset: None
    ) -> torch.Tensor:
        """Text and picture (B, S, D); `rotary_emb` are their angles (B, S, E), complex. The block also names what is
        for sampling with a cache."""
        from diffusers.models.attention_dispatch import dispatch_attention_fn

        q_BSHE, k_BSHE, v_BSHE = (
            project(hidden_states).unflatten(-1, (attn.heads, -1)) for project in (attn.to_q, attn.to_k, attn.to_v)
        )
        q_BSHE = turned(attn.norm_q(q_BSHE).to(v_BSHE.dtype), rotary_emb)
        k_BSHE = turned(attn.norm_k(k_BSHE).to(v_BSHE.dtype), rotary_emb)
        length, lengths = segments
        # No text token looks ahead, so none sees the padding behind its text.
        of_text = (rows_BSHE[:, :length] for rows_BSHE in (q_BSHE, k_BSHE, v_BSHE))
        text_BLHE = dispatch_attention_fn(*of_text, is_causal=True)
        if lengths is None:
            picture_BTHE = dispatch_attention_fn(q_BSHE[:, length:], k_BSHE, v_BSHE)
        else:
            pictures = []
            for number, own in enumerate(lengths):
                one = slice(number, number + 1)
                seen = (without(rows_BSHE[one], len(own), length) for rows_BSHE in (k_BSHE, v_BSHE))
                pictures.append(dispatch_attention_fn(q_BSHE[one, length:], *seen))
            picture_BTHE = torch.cat(pictures)
        mixed_BSHE = torch.cat([text_BLHE, picture_BTHE], dim=1)
        project, dropout = attn.to_out
        return dropout(project(mixed_BSHE.flatten(2).type_as(q_BSHE)))


def turned(rows_BSHE: torch.Tensor, rope_BSE: torch.Tensor) -> torch.Tensor:
    """Queries or keys at their places."""
    pairs = torch.view_as_complex(rows_BSHE.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rope_BSE.unsqueeze(2)).flatten(3).type_as(rows_BSHE)


class Entry(nn.Module):
    """Embeds text, picture and time, and makes the modulation of all blocks."""

    def __init__(self, denoiser: QwenImage21Transformer2DModel):
        super().__init__()
        self.img_in, self.txt_in = denoiser.img_in, denoiser.txt_in
        self.time_text_embed, self.modulation = denoiser.time_text_embed, denoiser.modulation
        self.causal_condition = denoiser.config.causal_condition

    def forward(self, inputs: QwenImage21Inputs) -> QwenImage21Stream:
        dtype = self.img_in.weight.dtype
        x_BTD = self.img_in(rearrange(inputs.x_BCfhw.to(dtype), "b c 1 h w -> b (h w) c"))
        text_BLD = self.txt_in(inputs.text_BLD.to(dtype))
        # The time stays float32 until it is embedded.
        t_R = torch.cat([inputs.t_B, inputs.t_B.new_zeros(1)]) if self.causal_condition else inputs.t_B
        time_RD = self.time_text_embed(t_R, x_BTD)
        return QwenImage21Stream(
            x_BSD=torch.cat([text_BLD, x_BTD], dim=1),
            text_lengths=inputs.text_lengths,
            time_RD=time_RD,
            modulation_RD=self.modulation(time_RD),
            rope_BSE=inputs.rope_BSE,
            canvas_hw0=x_BTD.new_empty(*inputs.x_BCfhw.shape[3:], 0),
        )


class Block(nn.Module):
    """A block, whose attention has `OwnTextAttention`."""

    recomputable = True

    def __init__(self, block: nn.Module, causal_condition: bool):
        super().__init__()
        self.block, self.causal_condition = block, causal_condition

    def forward(self, stream: QwenImage21Stream) -> QwenImage21Stream:
        length, x_BSD = stream.text_tokens, stream.x_BSD
        noisy_S = torch.arange(x_BSD.shape[1], device=x_BSD.device) >= length if self.causal_condition else None
        x_BSD = self.block(
            hidden_states=x_BSD,
            modulation=stream.modulation_RD,
            rotary_emb=stream.rope_BSE,
            target_token_mask=noisy_S,
            segments=Rows(length, stream.text_lengths),
        )
        return stream._replace(x_BSD=x_BSD)


class Exit(nn.Module):
    """Projects the image tokens to the latent (B, C, 1, h, w)."""

    def __init__(self, denoiser: QwenImage21Transformer2DModel):
        super().__init__()
        self.norm_out, self.proj_out = denoiser.norm_out, denoiser.proj_out

    def forward(self, stream: QwenImage21Stream) -> torch.Tensor:
        x_BTD = stream.x_BSD[:, stream.text_tokens :]
        x_BTC = self.proj_out(self.norm_out(x_BTD, stream.time_RD[: len(x_BTD)]))
        return rearrange(x_BTC, "b (h w) c -> b c 1 h w", h=stream.canvas_hw0.shape[0])


class QwenImage21Pipeline(BasePipeline):
    """Qwen-Image 2.1 of Alibaba, from text. Its latents hold the opacity of a picture too. It is not trained with
    pictures beside the caption."""

    Options = QwenImage21Options
    denoiser_class = "QwenImage21Transformer2DModel"
    config_keys = ("axes_dims_rope", "context_in_dim", "in_channels", "patch_size")
    text_parts = (TextPart(TEXT, "Qwen3VLModel", tokenizer="processor"),)
    media = MediaFacts(spatial=32)
    blocks = ("transformer_blocks",)
    stream_type = QwenImage21Stream
    original_layout = QWEN_21_LAYOUT
    guided_by_second_prediction = True

    # Kept, as every micro-batch asks for it.
    @cached_property
    def resolution_shift(self) -> ResolutionShift:
        config = self.scheduler().config
        named = {field: config.get(key) for field, key in SHIFT_KEYS.items()}
        return ResolutionShift(**{field: value for field, value in named.items() if value is not None})

    def problems_of_parts(self) -> Iterator[Problem]:
        config, made = self.parts.denoiser_config, self._vae_config["z_dim"]
        _, read = self.encoders()[1].shapes[TEXT]
        if config["patch_size"] != 1:
            yield self.parts.misfit(f"has patches of side {config['patch_size']}; give Qwen-Image 2.1, whose are 1")
        if config["in_channels"] != made:
            yield self.parts.misfit(
                f"takes latents of {config['in_channels']} channels and the VAE makes {made}; give the VAE of "
                "Qwen-Image 2.1"
            )
        if config["context_in_dim"] != read:
            yield self.parts.misfit(
                f"takes text of {config['context_in_dim']} features and Qwen3-VL makes {read}; give Qwen3-VL 8B"
            )

    def encoders(self, controls: int = 0) -> list[ModelEncoder]:
        options = self.options
        features = Caption(TEXT, options.max_sequence_length)
        vae = QwenImage21Autoencoder(options.diffusers_path, options.vae_path, self.dtype, draw=options.latents)
        return [vae, self.parts.text_encoder(features)]

    def build_denoiser(self) -> QwenImage21Transformer2DModel:
        denoiser = super().build_denoiser()
        for block in denoiser.transformer_blocks:
            block.attn.set_processor(OwnTextAttention())
        return denoiser

    def to_layers(self, denoiser: QwenImage21Transformer2DModel) -> list[nn.Module]:
        blocks = [Block(block, denoiser.config.causal_condition) for block in denoiser.transformer_blocks]
        return [Entry(denoiser), *blocks, Exit(denoiser)]

    def prepare_inputs(
        self, features: Features, x_t: torch.Tensor, t_B: torch.Tensor, guidance: float | None = None
    ) -> QwenImage21Inputs:
        text_BLD = features[TEXT]
        length = text_BLD.shape[1]
        lengths = features[f"{TEXT}_mask"].bool().sum(dim=1).tolist()
        is_padded = min(lengths) < length
        ropes = {own: self._angles(own, length, *x_t.shape[3:]) for own in lengths}
        return QwenImage21Inputs(
            x_BCfhw=x_t,
            text_BLD=text_BLD,
            text_lengths=tuple(torch.empty(own, 0) for own in lengths) if is_padded else None,
            t_B=t_B,
            rope_BSE=torch.stack([ropes[own] for own in (lengths if is_padded else lengths[:1])]),
        )

    def _angles(self, own: int, length: int, height: int, width: int) -> torch.Tensor:
        """The angles (S, E) of a text of `own` tokens, padded to `length`, and of the picture behind it."""
        is_picture_S = torch.arange(own + height * width) >= own
        angles_SE = self._rope([(1, height, width)], is_picture_S, torch.device("cpu"))
        padding = angles_SE[:1].expand(length - own, -1)
        return torch.cat([angles_SE[:own], padding, angles_SE[own:]])

    # Kept, as every micro-batch asks for it.
    @cached_property
    def _rope(self) -> QwenImage21Rope:
        """The places of text and picture as angles."""
        from diffusers.models.transformers.transformer_qwenimage21 import QwenImage21Rope

        return QwenImage21Rope(ROPE_BASE, self.parts.denoiser_config["axes_dims_rope"])

    def sampling_levels(self, steps: int) -> Sequence[float] | None:
        """Those that the folder's index names, if they are as many as `steps`; else even ones."""
        named = model_index(self.options.diffusers_path).get("sample_sigmas") or []
        return named if len(named) == steps else super().sampling_levels(steps)

    def tokens(self, latent_shape: Sequence[int]) -> int:
        *_, height, width = latent_shape
        return height * width

    def latent_shape(self, width: int, height: int, frames: int = 1) -> tuple[int, ...]:
        return latent_size(self._vae_config, width, height, frames)

    def scheduler(self) -> FlowMatchEulerDiscreteScheduler:
        return stock_scheduler(self.options.diffusers_path, "FlowMatchEulerDiscreteScheduler")

    # Kept, as every micro-batch asks for it.
    @cached_property
    def _vae_config(self) -> dict[str, Any]:
        return QWEN_IMAGE_21.config(self.options.diffusers_path, self.options.vae_path)
