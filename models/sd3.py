"""Stable Diffusion 3 and 3.5, all sizes: the folder's configuration tells them apart.

Shapes: B batch, T image tokens, L text tokens, P pooled text features, C latent channels, D width, h w latent cells.
"""

from __future__ import annotations

import logging
from contextlib import nullcontext
from functools import cached_property
from typing import Any, Literal, NamedTuple

import torch
from diffusers import SD3Transformer2DModel
from torch import nn

from models.base import Features, ModelEncoder
from models.families.pictures import PicturePipeline
from models.foundation.checkpoints.folders import check_diffusers_folder, part_override, read_config
from models.foundation.checkpoints.key_layouts import KeyLayout, KeyRule
from models.foundation.encoders.clip import clip
from models.foundation.encoders.text import TextEncoder, t5
from models.foundation.layers.chain import Middle
from models.foundation.layers.patches import unpatchify
from utils.errors import Problem, UserError
from utils.settings.model_schema import ModelSettings
from utils.settings.values import Count

logger = logging.getLogger(__name__)

TRAIN_STEPS = 1000
CLIP_TOKENS = 77
PARTS = ("scheduler", "transformer", "vae")
SINGLE_FILES = {"transformer": "transformer_path", "vae": "vae_path"}
TEXT_PARTS = {
    "clip_l": ("text_encoder", "tokenizer"),
    "clip_g": ("text_encoder_2", "tokenizer_2"),
    "t5": ("text_encoder_3", "tokenizer_3"),
}
CLIPS = ("clip_l", "clip_g")
CONFIG_KEYS = ("in_channels", "pooled_projection_dim", "joint_attention_dim")
POSITIONS = "pos_embed.pos_embed"

IMAGE_ATTENTION = {"qkv": ("to_q", "to_k", "to_v"), "ln_q": ("norm_q",), "ln_k": ("norm_k",), "proj": ("to_out.0",)}
TEXT_ATTENTION = {
    "qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
    "ln_q": ("norm_added_q",),
    "ln_k": ("norm_added_k",),
    "proj": ("to_add_out",),
}
ATTENTIONS = (
    ("x_block.attn", "attn", IMAGE_ATTENTION),
    ("x_block.attn2", "attn2", IMAGE_ATTENTION),
    ("context_block.attn", "attn", TEXT_ATTENTION),
)
MODULES = {
    "x_block.mlp.fc1": "ff.net.0.proj",
    "x_block.mlp.fc2": "ff.net.2",
    "x_block.adaLN_modulation.1": "norm1.linear",
    "context_block.mlp.fc1": "ff_context.net.0.proj",
    "context_block.mlp.fc2": "ff_context.net.2",
}


def mmdit_layout(num_layers: int) -> KeyLayout:
    """Stability's names. The last block only reads the text: its modulation has two parts, and their order differs."""
    return KeyLayout(
        [
            *(
                KeyRule(
                    f"joint_blocks.{{}}.{there}.{name}", tuple(f"transformer_blocks.{{}}.{here}.{p}" for p in parts)
                )
                for there, here, attention in ATTENTIONS
                for name, parts in attention.items()
            ),
            *(
                KeyRule(f"joint_blocks.{{}}.{there}", (f"transformer_blocks.{{}}.{here}",))
                for there, here in MODULES.items()
            ),
            *(
                KeyRule(
                    f"joint_blocks.{number}.context_block.adaLN_modulation.1",
                    (f"transformer_blocks.{number}.norm1_context.linear",),
                    swap_halves=number == num_layers - 1,
                )
                for number in range(num_layers)
            ),
            KeyRule("pos_embed", (POSITIONS,)),
            KeyRule("x_embedder.proj", ("pos_embed.proj",)),
            KeyRule("context_embedder", ("context_embedder",)),
            *(
                KeyRule(f"{there}_embedder.mlp.{index}", (f"time_text_embed.{here}_embedder.linear_{number}",))
                for there, here in (("t", "timestep"), ("y", "text"))
                for index, number in ((0, 1), (2, 2))
            ),
            KeyRule("final_layer.adaLN_modulation.1", ("norm_out.linear",), swap_halves=True),
            KeyRule("final_layer.linear", ("proj_out",)),
        ]
    )


class Sd3Options(ModelSettings):
    """`[model]` of `type = "sd3"`."""

    max_sequence_length: Count = 256
    """T5 tokens, padding included, which the model sees behind the 77 of CLIP."""
    drop_text_encoders: list[Literal["clip_l", "clip_g", "t5"]] = []
    """Text encoders to leave out: the model sees zeros instead, as it has learned to. One that the folder lacks is left
    out too."""


class Sd3Inputs(NamedTuple):
    """What the entry takes."""

    x_BChw: torch.Tensor
    text_BLD: torch.Tensor
    pooled_BP: torch.Tensor
    t_B: torch.Tensor


class Sd3Stream(NamedTuple):
    """What travels from layer to layer. The last block leaves no text; `canvas_hw0` has no elements: its shape carries
    the latent's height and width."""

    x_BTD: torch.Tensor
    text_BLD: torch.Tensor | None
    time_BD: torch.Tensor
    canvas_hw0: torch.Tensor


class Entry(nn.Module):
    """Embeds patches with their positions, text, and time with the pooled text."""

    def __init__(self, denoiser: SD3Transformer2DModel):
        super().__init__()
        self.pos_embed = denoiser.pos_embed
        self.context_embedder = denoiser.context_embedder
        self.time_text_embed = denoiser.time_text_embed

    def forward(self, inputs: Sd3Inputs) -> Sd3Stream:
        weight = self.context_embedder.weight
        return Sd3Stream(
            x_BTD=self.pos_embed(inputs.x_BChw.to(weight.dtype)).contiguous(),
            text_BLD=self.context_embedder(inputs.text_BLD.to(weight.dtype)),
            # The time stays float32 until it is embedded.
            time_BD=self.time_text_embed(inputs.t_B * TRAIN_STEPS, inputs.pooled_BP.to(weight.dtype)),
            canvas_hw0=torch.empty(*inputs.x_BChw.shape[2:], 0, device=weight.device),
        )


class Exit(nn.Module):
    """Projects the image tokens to the latent (B, C, h, w)."""

    def __init__(self, denoiser: SD3Transformer2DModel):
        super().__init__()
        self.norm_out = denoiser.norm_out
        self.proj_out = denoiser.proj_out

    def forward(self, stream: Sd3Stream) -> torch.Tensor:
        height, width, _ = stream.canvas_hw0.shape
        return unpatchify(self.proj_out(self.norm_out(stream.x_BTD, stream.time_BD)), height, width)


class Sd3Pipeline(PicturePipeline):
    """Stable Diffusion 3 medium and 3.5 medium, large and turbo, of Stability AI."""

    Options = Sd3Options
    blocks = ("transformer_blocks",)
    stream_type = Sd3Stream
    keep_in_high_precision = (POSITIONS,)
    guided_by_second_prediction = True

    @cached_property
    def original_layout(self) -> KeyLayout:
        return mmdit_layout(self._transformer_config["num_layers"])

    @cached_property
    def _present(self) -> list[str]:
        """The text encoders that there are and that are not dropped."""
        options = self.options
        return [
            name
            for name, (part, _) in TEXT_PARTS.items()
            if name not in options.drop_text_encoders
            and ((options.diffusers_path / part).is_dir() or part_override(options, name))
        ]

    def check(self) -> None:
        self._check_choice()
        parts = [part for name in self._present for part in TEXT_PARTS[name]]
        types = {TEXT_PARTS[name][0]: name for name in self._present}
        check_diffusers_folder(self.options, (*PARTS, *parts), SINGLE_FILES, types)
        self._check_variant()
        self.check_tensors()

    def _check_choice(self) -> None:
        """Whether any text encoder is left, and none is given and dropped at once."""
        folder, dropped = self.options.diffusers_path, self.options.drop_text_encoders
        if both := [entry.type for entry in self.options.text_encoders if entry.type in dropped]:
            raise UserError.of(
                f"drops '{both[0]}', for which text_encoders gives a file; leave one of them out",
                where="[model] drop_text_encoders",
            )
        if not self._present:
            raise UserError.of(
                "no text encoder is left, and the model would see no captions; drop fewer, or download text_encoder, "
                "text_encoder_2 or text_encoder_3 with its tokenizer",
                str(folder),
            )
        for name, (part, _) in TEXT_PARTS.items():
            if name not in (*self._present, *dropped):
                logger.warning("there is no %s in %s: the model sees zeros instead of %s", part, folder, name)

    def _check_variant(self) -> None:
        """Whether transformer, VAE and text encoders fit one another."""
        config, made = self._transformer_config, self.vae_config["latent_channels"]
        channels, pooled, width = (config[key] for key in CONFIG_KEYS)
        shapes = {key: shape for name in self._present for key, shape in self._text_encoder(name).shapes.items()}
        clips = {name: shapes[name] for name in CLIPS if name in shapes}
        widths = [features for _, features in clips.values()]
        fits = all(shape == (CLIP_TOKENS, *shapes[f"{name}_pooled"]) for name, shape in clips.items())
        # Side by side they are as wide as the model asks; one that is left out leaves room.
        fits = fits and (sum(widths) == pooled if len(widths) == len(CLIPS) else sum(widths) < pooled)
        wrong = {
            f"takes latents of {channels} channels and the VAE makes {made}; give SD3's own VAE": channels != made,
            f"takes {CLIP_TOKENS} tokens with {pooled} features of CLIP-L and CLIP-G together, and as many pooled; the "
            f"encoders here make {clips}; give SD3's own": not fits,
            f"takes text of {width} features and T5 makes {shapes.get('t5')}; give T5 v1.1 XXL": (
                "t5" in shapes and shapes["t5"][1] != width
            ),
        }
        file = str(self.options.diffusers_path / "transformer" / "config.json")
        if problems := [Problem(file, "", message) for message, holds in wrong.items() if holds]:
            raise UserError(problems)

    def encoders(self, controls: int = 0) -> list[ModelEncoder]:
        return [self.autoencoder(), *(self._text_encoder(name) for name in self._present)]

    def _text_encoder(self, name: str) -> TextEncoder:
        options, folder, (part, tokenizer) = self.options, self.options.diffusers_path, TEXT_PARTS[name]
        file = part_override(options, name)
        if name == "t5":
            return t5(folder, file, self.dtype, options.max_sequence_length, part, tokenizer)
        # SD3 pools CLIP-L without a projection. Its own folder says so by an identity; the files that ComfyUI reads
        # hold the one that CLIP was born with, or none.
        unprojected = name == "clip_l" and file is not None and file.is_file()
        pooled = "pooler_output" if unprojected else "text_embeds"
        return clip(name, folder, part, tokenizer, file, self.dtype, pooled)

    def build_denoiser(self) -> SD3Transformer2DModel:
        # The table of positions takes seconds and gigabytes to compute, and lies in the files.
        with nullcontext() if self.options.from_scratch else torch.device("meta"):
            denoiser = SD3Transformer2DModel.from_config(self._transformer_config)
        positions = denoiser.pos_embed.pos_embed
        del denoiser.pos_embed.pos_embed
        # As a frozen parameter it is read, and exported, with the rest.
        denoiser.pos_embed.pos_embed = nn.Parameter(positions, requires_grad=False)
        return denoiser

    def to_layers(self, denoiser: SD3Transformer2DModel) -> list[nn.Module]:
        reads = {"hidden_states": "x_BTD", "encoder_hidden_states": "text_BLD", "temb": "time_BD"}
        middles = [Middle(block, reads, writes=("text_BLD", "x_BTD")) for block in denoiser.transformer_blocks]
        return [Entry(denoiser), *middles, Exit(denoiser)]

    def prepare_inputs(
        self, features: Features, x_t: torch.Tensor, t_B: torch.Tensor, guidance: float | None = None
    ) -> Sd3Inputs:
        return Sd3Inputs(x_t, *self._conditions(features, len(x_t)), t_B)

    def _conditions(self, features: Features, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Text tokens (B, L, D) and pooled text (B, P), zeros where an encoder is left out: CLIP-L and CLIP-G beside
        each other in the first tokens, T5 in those behind them."""
        config = self._transformer_config
        tokens, pooled_width = CLIP_TOKENS + self.options.max_sequence_length, config["pooled_projection_dim"]
        text_BLD = torch.zeros(batch, tokens, config["joint_attention_dim"], dtype=self.dtype)
        pooled_BP = torch.zeros(batch, pooled_width, dtype=self.dtype)
        for name in CLIPS:
            if name in features:
                width = features[name].shape[2]
                start = 0 if name == "clip_l" else pooled_width - width
                text_BLD[:, :CLIP_TOKENS, start : start + width] = features[name]
                pooled_BP[:, start : start + width] = features[f"{name}_pooled"]
        if "t5" in features:
            text_BLD[:, CLIP_TOKENS:] = features["t5"]
        return text_BLD, pooled_BP

    def sampling_levels(self, steps: int) -> None:
        return None

    # Kept: every micro-batch asks for it.
    @cached_property
    def _transformer_config(self) -> dict[str, Any]:
        keys = (*CONFIG_KEYS, "num_layers")
        return read_config(self.options.diffusers_path, "transformer", model="SD3Transformer2DModel", keys=keys)
