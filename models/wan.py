"""Wan 2.1 and 2.2, text to video: one chain of blocks over latent patches that attend to the text.

Both sizes of 2.1, and each of the two experts of 2.2 A14B. Pictures and clips are trained together.

Shapes: B batch, C latent channels, f h w latent frames, height and width, T video tokens, L text tokens, D width of the
transformer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

import torch
from diffusers import UniPCMultistepScheduler, WanTransformer3DModel
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from einops import rearrange
from torch import nn
from torch.nn import functional
from transformers import UMT5EncoderModel

from models.base import BasePipeline, Features, ModelEncoder
from models.foundation.files import check_diffusers_folder, part_override, read_config
from models.foundation.key_layouts import KeyLayout, Rule
from models.foundation.stages import Middle
from models.foundation.text_encoders import TextEncoder, TrueLengthFeatures
from models.foundation.video_autoencoders import WanAutoencoder, latent_size, wan_vae_config
from utils.dataset.buckets import MediaFacts
from utils.settings.errors import SettingsError
from utils.settings.schema import ModelSettings
from utils.settings.values import Count

PARTS = ("scheduler", "text_encoder", "tokenizer", "vae")
TEXT_ENCODERS = {"text_encoder": "umt5"}
EXPERT_FOLDERS = {"high": "transformer", "low": "transformer_2"}
TRAIN_STEPS = 1000

ATTENTION = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0", "norm_q": "norm_q", "norm_k": "norm_k"}
WAN_LAYOUT = KeyLayout(
    [
        *(
            Rule(f"blocks.{{}}.{there}.{part}", (f"blocks.{{}}.{here}.{ours}",))
            for there, here in (("self_attn", "attn1"), ("cross_attn", "attn2"))
            for part, ours in ATTENTION.items()
        ),
        Rule("blocks.{}.norm3", ("blocks.{}.norm2",)),
        Rule("blocks.{}.ffn.0", ("blocks.{}.ffn.net.0.proj",)),
        Rule("blocks.{}.ffn.2", ("blocks.{}.ffn.net.2",)),
        Rule("blocks.{}.modulation", ("blocks.{}.scale_shift_table",)),
        Rule("patch_embedding", ("patch_embedding",)),
        Rule("time_embedding.0", ("condition_embedder.time_embedder.linear_1",)),
        Rule("time_embedding.2", ("condition_embedder.time_embedder.linear_2",)),
        Rule("time_projection.1", ("condition_embedder.time_proj",)),
        Rule("text_embedding.0", ("condition_embedder.text_embedder.linear_1",)),
        Rule("text_embedding.2", ("condition_embedder.text_embedder.linear_2",)),
        Rule("head.head", ("proj_out",)),
        Rule("head.modulation", ("scale_shift_table",)),
    ]
)


class WanOptions(ModelSettings):
    """`[model]` of `type = "wan"`."""

    expert: Literal["high", "low"] = "high"
    """Of Wan 2.2 A14B: the expert for much noise (set min_t = 0.875) or for little (max_t = 0.875). Wan 2.1 has one
    model, in the place of the high one."""
    max_sequence_length: Count = 512
    """UMT5 tokens that the model sees, padding included."""


class WanInputs(NamedTuple):
    """What the entry takes. `text_BLD` is padded to the batch's longest caption alone."""

    x_BCfhw: torch.Tensor
    text_BLD: torch.Tensor
    t_B: torch.Tensor


class WanStream(NamedTuple):
    """What travels from layer to layer. `canvas_fhw0` has no elements: its shape carries the tokens' grid."""

    x_BTD: torch.Tensor
    text_BLD: torch.Tensor
    modulation_B6D: torch.Tensor
    time_BD: torch.Tensor
    rope_1T1D: tuple[torch.Tensor, torch.Tensor]
    canvas_fhw0: torch.Tensor


class Entry(nn.Module):
    """Embeds patches, text, time and positions."""

    def __init__(self, denoiser: WanTransformer3DModel, text_tokens: int):
        super().__init__()
        self.rope = denoiser.rope
        self.patch_embedding = denoiser.patch_embedding
        self.condition_embedder = denoiser.condition_embedder
        self.text_tokens = text_tokens

    def forward(self, inputs: WanInputs) -> WanStream:
        weight = self.patch_embedding.weight
        x_BCfhw = inputs.x_BCfhw.to(weight.dtype)
        text_BLD = functional.pad(inputs.text_BLD, (0, 0, 0, self.text_tokens - inputs.text_BLD.shape[1]))
        time_BD, modulation_BE, text_BLD, _ = self.condition_embedder(
            inputs.t_B * TRAIN_STEPS, text_BLD.to(weight.dtype)
        )
        patches_BDfhw = self.patch_embedding(x_BCfhw)
        return WanStream(
            x_BTD=rearrange(patches_BDfhw, "b d f h w -> b (f h w) d").contiguous(),
            text_BLD=text_BLD,
            modulation_B6D=modulation_BE.unflatten(1, (6, -1)),
            time_BD=time_BD,
            rope_1T1D=self.rope(x_BCfhw),
            canvas_fhw0=torch.empty(*patches_BDfhw.shape[2:], 0, device=weight.device),
        )


class Exit(nn.Module):
    """Projects the tokens to the latent (B, C, f, h, w)."""

    def __init__(self, denoiser: WanTransformer3DModel):
        super().__init__()
        self.norm_out = denoiser.norm_out
        self.proj_out = denoiser.proj_out
        self.scale_shift_table = denoiser.scale_shift_table
        self.patch = tuple(denoiser.config.patch_size)

    def forward(self, stream: WanStream) -> torch.Tensor:
        shift_B1D, scale_B1D = (self.scale_shift_table + stream.time_BD.unsqueeze(1)).chunk(2, dim=1)
        x_BTD = (self.norm_out(stream.x_BTD.float()) * (1 + scale_B1D) + shift_B1D).type_as(stream.x_BTD)
        frames, height, width, _ = stream.canvas_fhw0.shape
        return rearrange(
            self.proj_out(x_BTD),
            "b (f h w) (p q r c) -> b c (f p) (h q) (w r)",
            **dict(zip("fhwpqr", (frames, height, width, *self.patch), strict=True)),
        )


@dataclass(frozen=True)
class CleanedFeatures(TrueLengthFeatures):
    """`TrueLengthFeatures` of the caption as Wan's pipeline cleans it: no HTML entities, single spaces, broken Unicode
    mended."""

    def __call__(self, text_encoder: nn.Module, tokenizer: Any, captions: list[str]) -> dict[str, list[torch.Tensor]]:
        return super().__call__(text_encoder, tokenizer, [prompt_clean(caption) for caption in captions])


class WanPipeline(BasePipeline):
    """Wan of Alibaba: text to video."""

    Options = WanOptions
    media = MediaFacts(spatial=16, temporal=4, max_frames=241, rate=16.0)
    blocks = ("blocks",)
    stream_type = WanStream
    original_layout = WAN_LAYOUT
    guided_by_second_prediction = True
    keep_in_high_precision = ("time_embedder", "scale_shift_table", "norm2")

    @property
    def denoiser_folder(self) -> str:
        return EXPERT_FOLDERS[self.options.expert]

    def check(self) -> None:
        single_files = {self.denoiser_folder: "transformer_path", "vae": "vae_path"}
        parts = (*PARTS, self.denoiser_folder)
        check_diffusers_folder(self.options, parts, single_files, TEXT_ENCODERS, denoiser=self.denoiser_folder)
        config, channels = self._transformer_config, self._vae_config["z_dim"]
        if config["in_channels"] != channels or config.get("image_dim"):
            raise SettingsError.of(
                f"this transformer takes {config['in_channels']} channels and the VAE makes {channels}: a model that "
                "starts from a picture (i2v), which is not trained here yet; give a text-to-video model",
                str(self.options.diffusers_path / self.denoiser_folder / "config.json"),
            )
        if self._vae_config.get("patch_size"):
            raise SettingsError.of(
                "this is the VAE of Wan 2.2 TI2V-5B, which is not trained here yet; give Wan 2.1 or Wan 2.2 A14B",
                str(self.options.diffusers_path / "vae" / "config.json"),
            )
        self.check_tensors()

    def encoders(self, controls: int = 0) -> list[ModelEncoder]:
        options, folder = self.options, self.options.diffusers_path
        width = read_config(folder, "text_encoder", model="umt5", keys=["d_model"])["d_model"]
        length = options.max_sequence_length
        shapes = {"umt5": (length, width), "umt5_mask": (length,)}
        features = CleanedFeatures("umt5", length)
        text = (UMT5EncoderModel, folder, "text_encoder", "tokenizer", part_override(options, "umt5"), self.dtype)
        return [
            WanAutoencoder(folder, options.vae_path, self.dtype, draw=options.latents),
            TextEncoder("umt5", *text, features, shapes),
        ]

    def build_denoiser(self) -> WanTransformer3DModel:
        return WanTransformer3DModel.from_config(self._transformer_config)

    def to_layers(self, denoiser: WanTransformer3DModel) -> list[nn.Module]:
        reads = {
            "hidden_states": "x_BTD",
            "encoder_hidden_states": "text_BLD",
            "temb": "modulation_B6D",
            "rotary_emb": "rope_1T1D",
        }
        middles = [Middle(block, reads, writes=("x_BTD",)) for block in denoiser.blocks]
        return [Entry(denoiser, self.options.max_sequence_length), *middles, Exit(denoiser)]

    def prepare_inputs(
        self, features: Features, x_t: torch.Tensor, t_B: torch.Tensor, guidance: float | None = None
    ) -> WanInputs:
        return WanInputs(x_t, features["umt5"], t_B)

    def tokens(self, latent_shape: Sequence[int]) -> int:
        _, frames, height, width = latent_shape
        return frames * (height // 2) * (width // 2)

    def latent_shape(self, width: int, height: int, frames: int = 1) -> tuple[int, ...]:
        return latent_size(self._vae_config, width, height, frames)

    def scheduler(self) -> UniPCMultistepScheduler:
        return UniPCMultistepScheduler.from_pretrained(self.options.diffusers_path, subfolder="scheduler")

    def sampling_levels(self, steps: int) -> None:
        return None

    # Kept: every micro-batch asks for them.
    @cached_property
    def _transformer_config(self) -> dict[str, Any]:
        return read_config(self.options.diffusers_path, self.denoiser_folder, model="WanTransformer3DModel")

    @cached_property
    def _vae_config(self) -> dict[str, Any]:
        return wan_vae_config(self.options.diffusers_path, self.options.vae_path)
