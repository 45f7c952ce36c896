"""PixArt-alpha and PixArt-Sigma: one chain of blocks over image tokens that attend to the text; DDPM's steps.

They learn the variance of a step besides the noise, in the same number of additional channels. PixArt-alpha for 1024
pixels is told the size of the picture.

Shapes: B batch, T image tokens, L text tokens, C latent channels, D width, M six times that, h w latent cells.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from models.base import Features, ModelEncoder
from models.families.ddpm import DDPMOptions, ddpm_objective, ddpm_scheduler
from models.families.pictures import PicturePipeline
from models.foundation.checkpoints.folders import TextPart, model_index
from models.foundation.checkpoints.layouts.pixart import PIXART_LAYOUT
from models.foundation.encoders.text_features import TrueLengthFeatures
from models.foundation.layers.chain import Middle
from models.foundation.layers.patches import PATCH, unpatchify
from utils.diffusion.objectives import Epsilon
from utils.errors import Problem
from utils.settings.values import Count, NotNegative

if TYPE_CHECKING:
    from diffusers import PixArtTransformer2DModel

ALPHA = "PixArtAlphaPipeline"
TEXT_TOKENS = {ALPHA: 120}
SIGMA_TOKENS = 300
TOLD_SIZES = 128
"""The `sample_size` of models that are told sizes, unless they say otherwise."""
CELLS_OF_SCALE = 64


class PixArtOptions(DDPMOptions):
    """`[model]` of `type = "pixart"`.

    Captions are read in small letters, as in inference, which also takes marks and addresses out of prompts where the
    packages for it are installed (`clean_caption`).
    """

    max_sequence_length: Count | None = None
    """Number of T5 tokens of a caption that are read; default: 120 of PixArt-alpha, 300 of PixArt-Sigma."""
    vlb_weight: NotNegative = 0.0
    """Weight of the variational term, from which the model learns the variance of a step: 0.001 is usual (Nichol and
    Dhariwal 2021), 0 leaves the term out. Stock samplers do not use this variance."""


class PixArtInputs(NamedTuple):
    """The inputs of the entry. Without a mask, no text is padded. Sizes are None for a model that is told none."""

    x_BChw: torch.Tensor
    places_1TD: torch.Tensor
    text_BLD: torch.Tensor
    mask_BL: torch.Tensor | None
    step_B: torch.Tensor
    size_B2: torch.Tensor | None
    ratio_B1: torch.Tensor | None


class PixArtStream(NamedTuple):
    """What travels from layer to layer. `canvas_hw0` has no elements: its shape carries the latent's height and
    width."""

    x_BTD: torch.Tensor
    text_BLD: torch.Tensor
    mask_B1L: torch.Tensor | None
    time_BD: torch.Tensor
    modulation_BM: torch.Tensor
    canvas_hw0: torch.Tensor


@dataclass(frozen=True)
class SmallLetters(TrueLengthFeatures):
    """`TrueLengthFeatures` of captions in small letters, without spaces around them."""

    def written(self, tokenizer: Any, caption: str) -> str:
        return caption.lower().strip()

    def __call__(self, text_encoder: nn.Module, tokenizer: Any, captions: list[str]) -> dict[str, list[torch.Tensor]]:
        return super().__call__(text_encoder, tokenizer, [self.written(tokenizer, caption) for caption in captions])


class Entry(nn.Module):
    """Embeds patches, text, and time with the sizes."""

    def __init__(self, denoiser: PixArtTransformer2DModel):
        super().__init__()
        self.pos_embed = denoiser.pos_embed
        self.adaln_single, self.caption_projection = denoiser.adaln_single, denoiser.caption_projection

    def forward(self, inputs: PixArtInputs) -> PixArtStream:
        project = self.pos_embed.proj
        dtype = project.weight.dtype
        x_BTD = project(inputs.x_BChw.to(dtype)).flatten(2).transpose(1, 2)
        # Time and sizes stay float32 until they are embedded.
        modulation_BM, time_BD = self.adaln_single(
            inputs.step_B,
            {"resolution": inputs.size_B2, "aspect_ratio": inputs.ratio_B1},
            batch_size=len(x_BTD),
            hidden_dtype=dtype,
        )
        return PixArtStream(
            x_BTD=(x_BTD + inputs.places_1TD).to(dtype),
            text_BLD=self.caption_projection(inputs.text_BLD.to(dtype)),
            mask_B1L=None if inputs.mask_BL is None else inputs.mask_BL.unsqueeze(1),
            time_BD=time_BD,
            modulation_BM=modulation_BM,
            canvas_hw0=x_BTD.new_empty(*inputs.x_BChw.shape[2:], 0),
        )


class Exit(nn.Module):
    """Projects the tokens to the noise and the variance (B, 2C, h, w)."""

    def __init__(self, denoiser: PixArtTransformer2DModel):
        super().__init__()
        self.norm_out, self.proj_out = denoiser.norm_out, denoiser.proj_out
        self.scale_shift_table = denoiser.scale_shift_table

    def forward(self, stream: PixArtStream) -> torch.Tensor:
        height, width, _ = stream.canvas_hw0.shape
        shift_B1D, scale_B1D = (self.scale_shift_table[None] + stream.time_BD[:, None]).chunk(2, dim=1)
        x_BTD = self.norm_out(stream.x_BTD) * (1 + scale_B1D) + shift_B1D
        return unpatchify(self.proj_out(x_BTD), height, width)


class PixArtPipeline(PicturePipeline):
    """PixArt-alpha and PixArt-Sigma of Huawei, of all sizes. Inference takes the nearest of the sizes that they were
    trained on; samples are drawn at the size that is asked for."""

    Options = PixArtOptions
    denoiser_class = "PixArtTransformer2DModel"
    config_keys = (
        "attention_head_dim",
        "caption_channels",
        "in_channels",
        "num_attention_heads",
        "out_channels",
        "patch_size",
        "sample_size",
    )
    text_parts = (TextPart("t5", "T5EncoderModel"),)
    scheduler_sets_levels = True
    blocks = ("transformer_blocks",)
    stream_type = PixArtStream
    original_layout = PIXART_LAYOUT
    guided_by_second_prediction = True

    @cached_property
    def objective(self) -> Epsilon:
        return ddpm_objective(self.options, learns_sigma=True)

    @property
    def variational_weight(self) -> float:
        return self.options.vlb_weight

    def problems_of_parts(self) -> Iterator[Problem]:
        config, made = self.parts.denoiser_config, self.vae_config["latent_channels"]
        width, read = config["caption_channels"], self.parts.text_config("t5")["d_model"]
        if config["patch_size"] != PATCH:
            yield self.parts.misfit(f"has patches of side {config['patch_size']}; give PixArt, whose are {PATCH}")
        if config["in_channels"] != made:
            yield self.parts.misfit(
                f"takes latents of {config['in_channels']} channels and the VAE makes {made}; give PixArt's own VAE"
            )
        if config["out_channels"] != 2 * config["in_channels"]:
            yield self.parts.misfit(
                f"takes {config['in_channels']} channels and gives {config['out_channels']}, and PixArt gives twice as "
                "many, for noise and variance; download it again"
            )
        if width != read:
            yield self.parts.misfit(f"takes text of {width} features and its T5 makes {read}; give T5-XXL")

    def encoders(self, controls: int = 0) -> list[ModelEncoder]:
        named = model_index(self.options.diffusers_path).get("_class_name")
        length = self.options.max_sequence_length or TEXT_TOKENS.get(named, SIGMA_TOKENS)
        return [self.autoencoder(), self.parts.text_encoder(SmallLetters("t5", length))]

    def to_layers(self, denoiser: PixArtTransformer2DModel) -> list[nn.Module]:
        reads = {
            "hidden_states": "x_BTD",
            "encoder_hidden_states": "text_BLD",
            "encoder_attention_mask": "mask_B1L",
            "timestep": "modulation_BM",
        }
        middles = [Middle(block, reads, writes=("x_BTD",)) for block in denoiser.transformer_blocks]
        return [Entry(denoiser), *middles, Exit(denoiser)]

    def prepare_inputs(
        self, features: Features, x_t: torch.Tensor, t_B: torch.Tensor, guidance: float | None = None
    ) -> PixArtInputs:
        mask_BL, (height, width) = features["t5_mask"].bool(), x_t.shape[2:]
        size_B2 = torch.tensor([[height, width]] * len(x_t), dtype=torch.float32) * self.cell
        told = self._is_told_sizes
        return PixArtInputs(
            x_BChw=x_t,
            places_1TD=self._places(height // PATCH, width // PATCH),
            text_BLD=features["t5"],
            # With a mask, even of ones, attention is slower.
            mask_BL=None if mask_BL.all() else mask_BL,
            step_B=self.objective.model_time(t_B),
            size_B2=size_B2 if told else None,
            ratio_B1=size_B2[:, :1] / size_B2[:, 1:] if told else None,
        )

    def _places(self, rows: int, columns: int) -> torch.Tensor:
        """The embedding of the place of each image token (1, T, D)."""
        from diffusers.models.embeddings import get_2d_sincos_pos_embed

        config = self.parts.denoiser_config
        side = config["sample_size"]
        places_TD = get_2d_sincos_pos_embed(
            config["num_attention_heads"] * config["attention_head_dim"],
            (rows, columns),
            base_size=side // PATCH,
            interpolation_scale=config.get("interpolation_scale") or max(side // CELLS_OF_SCALE, 1),
            output_type="pt",
        )
        return places_TD.float().unsqueeze(0)

    def scheduler(self) -> Any:
        return ddpm_scheduler(self.options)

    @property
    def _is_told_sizes(self) -> bool:
        config = self.parts.denoiser_config
        told = config.get("use_additional_conditions")
        return config["sample_size"] == TOLD_SIZES if told is None else told
