"""Sana: linear attention on the latents of a deep compression autoencoder; texts of Gemma 2.

Shapes: B batch, T image tokens, L text tokens, C latent channels, D width, M six times that, h w latent cells.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from einops import rearrange
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from models.base import Features, ModelEncoder
from models.families.pictures import PicturePipeline
from models.foundation.checkpoints.configs import SCHEDULER_FILE, stock_scheduler
from models.foundation.checkpoints.folders import TextPart
from models.foundation.checkpoints.layouts.sana import SANA_LAYOUT
from models.foundation.checkpoints.stock import of_diffusers
from models.foundation.encoders.dc_vae import DC, DeepAutoencoder, cell_of
from models.foundation.encoders.text_features import Shapes, TextFeatures
from utils.dataset.buckets import MediaFacts
from utils.diffusion.objectives import FlowMatching
from utils.errors import Problem
from utils.json_files import read_json
from utils.settings.model_schema import ModelSettings
from utils.settings.values import Count

if TYPE_CHECKING:
    from diffusers import SanaTransformer2DModel
    from transformers import PretrainedConfig

TEXT = "gemma2"
TRAIN_STEPS = 1000
SCHEDULERS = ("DPMSolverMultistepScheduler", "FlowMatchEulerDiscreteScheduler")


class SanaOptions(ModelSettings):
    """`[model]` of `type = "sana"`.

    Captions have the stock pipeline's instruction before them, unless they are empty; so has `[sampling]
    negative_prompt`.
    """

    max_sequence_length: Count = 300
    """Number of Gemma's tokens that the model sees: the mark that begins a text, the last one of the instruction, and
    those of the caption."""


class SanaInputs(NamedTuple):
    """The inputs of the entry. Without a mask, no text is padded."""

    x_BChw: torch.Tensor
    text_BLD: torch.Tensor
    mask_BL: torch.Tensor | None
    time_B: torch.Tensor


class SanaStream(NamedTuple):
    """What travels from layer to layer. `canvas_hw0` has no elements: its shape carries the latent's height and
    width."""

    x_BTD: torch.Tensor
    text_BLD: torch.Tensor
    mask_B1L: torch.Tensor | None
    time_BD: torch.Tensor
    modulation_BM: torch.Tensor
    canvas_hw0: torch.Tensor


@dataclass(frozen=True)
class InstructedFeatures(TextFeatures):
    """The last hidden state of Gemma for a caption in small letters behind an instruction: of the first token, and from
    the instruction's last one on (l, D), and a mask (l,) of ones. An empty caption is the first token alone.

    Attributes:
        length: number of tokens of a caption that are read, with the mark that begins it.
        instruction: what is written before a caption.
    """

    name: str
    length: int
    instruction: str

    def shapes(self, config: PretrainedConfig) -> Shapes:
        return {self.name: (self.length + 1, config.hidden_size), f"{self.name}_mask": (self.length + 1,)}

    def written(self, tokenizer: Any, caption: str) -> str:
        # The instruction does not count as a part of the caption.
        return caption.lower().strip()

    def __call__(self, text_encoder: nn.Module, tokenizer: Any, captions: list[str]) -> dict[str, list[torch.Tensor]]:
        before = len(tokenizer(self.instruction).input_ids)
        texts = [caption and self.instruction + self.written(tokenizer, caption) for caption in captions]
        # The caption's own mark is the instruction's.
        most = before + self.length - 1
        rows = [tokenizer(text, max_length=most, truncation=True).input_ids for text in texts]
        # It is causal, so padding behind a caption does not change it.
        tokens_BL = pad_sequence([torch.tensor(row) for row in rows], batch_first=True).to(text_encoder.device)
        mask_BL = pad_sequence([torch.ones(len(row), dtype=torch.long) for row in rows], batch_first=True)
        hidden_BLD = text_encoder(tokens_BL, attention_mask=mask_BL.to(tokens_BL.device)).last_hidden_state
        features = [
            torch.cat([hidden[:1], hidden[before - 1 : len(row)]]) if caption else hidden[: len(row)]
            for hidden, row, caption in zip(hidden_BLD, rows, captions, strict=True)
        ]
        masks = [torch.ones(len(hidden), dtype=torch.bool) for hidden in features]
        return {self.name: features, f"{self.name}_mask": masks}


class Entry(nn.Module):
    """Embeds patches, text and time."""

    def __init__(self, denoiser: SanaTransformer2DModel):
        super().__init__()
        self.patch_embed, self.time_embed = denoiser.patch_embed, denoiser.time_embed
        self.caption_projection, self.caption_norm = denoiser.caption_projection, denoiser.caption_norm

    def forward(self, inputs: SanaInputs) -> SanaStream:
        dtype = self.patch_embed.proj.weight.dtype
        x_BTD = self.patch_embed(inputs.x_BChw.to(dtype))
        # The time stays float32 until it is embedded.
        modulation_BM, time_BD = self.time_embed(inputs.time_B, batch_size=len(x_BTD), hidden_dtype=dtype)
        return SanaStream(
            x_BTD=x_BTD,
            text_BLD=self.caption_norm(self.caption_projection(inputs.text_BLD.to(dtype))),
            mask_B1L=None if inputs.mask_BL is None else inputs.mask_BL.unsqueeze(1),
            time_BD=time_BD,
            modulation_BM=modulation_BM,
            canvas_hw0=x_BTD.new_empty(*inputs.x_BChw.shape[2:], 0),
        )


class Block(nn.Module):
    """A block, which is told height and width."""

    recomputable = True

    def __init__(self, block: nn.Module):
        super().__init__()
        self.block = block

    def forward(self, stream: SanaStream) -> SanaStream:
        height, width, _ = stream.canvas_hw0.shape
        x_BTD = self.block(
            stream.x_BTD,
            encoder_hidden_states=stream.text_BLD,
            encoder_attention_mask=stream.mask_B1L,
            timestep=stream.modulation_BM,
            height=height,
            width=width,
        )
        return stream._replace(x_BTD=x_BTD)


class Exit(nn.Module):
    """Projects the image tokens to the latent (B, C, h, w)."""

    def __init__(self, denoiser: SanaTransformer2DModel):
        super().__init__()
        self.norm_out, self.proj_out = denoiser.norm_out, denoiser.proj_out
        self.scale_shift_table = denoiser.scale_shift_table

    def forward(self, stream: SanaStream) -> torch.Tensor:
        x_BTC = self.proj_out(self.norm_out(stream.x_BTD, stream.time_BD, self.scale_shift_table))
        return rearrange(x_BTC, "b (h w) c -> b c h w", h=stream.canvas_hw0.shape[0])


class SanaPipeline(PicturePipeline):
    """Sana and Sana 1.5 of NVIDIA."""

    Options = SanaOptions
    denoiser_class = "SanaTransformer2DModel"
    config_keys = ("caption_channels", "in_channels", "out_channels", "patch_size")
    text_parts = (TextPart(TEXT, "Gemma2Model"),)
    media = MediaFacts(spatial=32)
    patch = 1
    objective = FlowMatching(time_scale=TRAIN_STEPS)
    scheduler_sets_levels = True
    blocks = ("transformer_blocks",)
    stream_type = SanaStream
    original_layout = SANA_LAYOUT
    comfyui_note = "ComfyUI itself has no Sana; the file has its publisher's names, for extensions that read these"
    guided_by_second_prediction = True
    noise_in_float32 = True

    def problems_of_parts(self) -> Iterator[Problem]:
        config, made = self.parts.denoiser_config, self.vae_config["latent_channels"]
        width, read = config["caption_channels"], self.parts.text_config(TEXT)["hidden_size"]
        if config.get("guidance_embeds"):
            yield self.parts.misfit("is of Sana Sprint, which was distilled and is not trained here; give Sana")
        if config["patch_size"] != 1:
            yield self.parts.misfit(f"has patches of side {config['patch_size']}; give Sana, whose are 1")
        if config["in_channels"] != made or config["out_channels"] != made:
            yield self.parts.misfit(
                f"takes latents of {config['in_channels']} channels, gives {config['out_channels']}, and the VAE makes "
                f"{made}; give Sana and its own VAE"
            )
        if width != read:
            yield self.parts.misfit(f"takes text of {width} features and Gemma makes {read}; give Gemma 2 2B")
        if self._scheduler_class not in SCHEDULERS:
            said = f"is of {self._scheduler_class}; one of {' or '.join(SCHEDULERS)} belongs here"
            yield Problem(str(self.options.diffusers_path / SCHEDULER_FILE), "", said)

    def encoders(self, controls: int = 0) -> list[ModelEncoder]:
        features = InstructedFeatures(TEXT, self.options.max_sequence_length - 1, _instruction())
        return [self.autoencoder(), self.parts.text_encoder(features)]

    def autoencoder(self) -> DeepAutoencoder:
        options = self.options
        return DeepAutoencoder(options.diffusers_path, options.vae_path, self.dtype, draw=options.latents)

    def to_layers(self, denoiser: SanaTransformer2DModel) -> list[nn.Module]:
        return [Entry(denoiser), *map(Block, denoiser.transformer_blocks), Exit(denoiser)]

    def prepare_inputs(
        self, features: Features, x_t: torch.Tensor, t_B: torch.Tensor, guidance: float | None = None
    ) -> SanaInputs:
        mask_BL = features[f"{TEXT}_mask"].bool()
        return SanaInputs(
            x_BChw=x_t,
            text_BLD=features[TEXT],
            # With a mask, even of ones, attention is slower.
            mask_BL=None if mask_BL.all() else mask_BL,
            time_B=self.objective.model_time(t_B) * self.parts.denoiser_config.get("timestep_scale", 1.0),
        )

    def scheduler(self) -> Any:
        """Of the class that the folder names."""
        return stock_scheduler(self.options.diffusers_path, self._scheduler_class)

    @property
    def _scheduler_class(self) -> str:
        return read_json(self.options.diffusers_path / SCHEDULER_FILE).get("_class_name", SCHEDULERS[0])

    # Kept, as every micro-batch asks for it.
    @cached_property
    def vae_config(self) -> dict[str, Any]:
        return DC.config(self.options.diffusers_path, self.options.vae_path)

    @property
    def cell(self) -> int:
        return cell_of(self.vae_config)


def _instruction() -> str:
    """What the stock pipeline writes before prompts."""
    asked = inspect.signature(of_diffusers("SanaPipeline").__call__).parameters["complex_human_instruction"]
    lines: Sequence[str] = asked.default
    return "\n".join(lines)
