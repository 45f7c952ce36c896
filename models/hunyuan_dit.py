"""HunyuanDiT 1.1 and 1.2: a chain of blocks with skip connections from the first half to the second, as in a UNet.

It learns the variance of a step besides v, in the same number of additional channels. Two encoders read each caption:
BERT and mT5. The blocks see the tokens of both, and those of mT5 are also pooled for the time embedding. 1.1 is also
conditioned on sizes and on a style, of which there is only one.

Shapes: B batch, C latent channels, h w latent cells, T image tokens, L text tokens, D width, E features of mT5, H
features of an attention head.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional

from models.base import Features, ModelEncoder
from models.families.ddpm import DDPMOptions, ddpm_objective, ddpm_scheduler
from models.families.pictures import PicturePipeline
from models.foundation.checkpoints.folders import TextPart
from models.foundation.checkpoints.headers import read_header
from models.foundation.checkpoints.layouts.hunyuan_dit import ORIGINAL_LAYOUT
from models.foundation.checkpoints.weights import CheckpointNames
from models.foundation.encoders.sizes import SIZES, SizeEncoder
from models.foundation.encoders.text import TextEncoder
from models.foundation.encoders.text_features import PaddedFeatures, TrueLengthFeatures
from models.foundation.layers.patches import PATCH, unpatchify
from utils.diffusion.objectives import Epsilon
from utils.errors import Problem
from utils.settings.values import NotNegative

if TYPE_CHECKING:
    from diffusers import HunyuanDiT2DModel

ROTARY_GRID = 32
"""Number of tokens on the longer side of the grid to which positions are scaled: those of 512 pixels."""
USUAL_SIDE = 1024
"""The side in pixels of the file from which a sample pretends to come."""
WIDTH_FIRST = [1, 0, 5, 4, 3, 2]
"""Indices that bring `SIZES` into the publisher's order: width and height of the file, width and height of the trained
picture, left and top of the crop. diffusers and ComfyUI give heights first, which makes no difference for squares."""
PADDING_KEY, STYLE_KEY = "text_embedding_padding", "style_embedder.weight"
VERSIONS = {False: "1.2, which is told no sizes", True: "1.1 or older, which is told sizes"}


class HunyuanDitOptions(DDPMOptions):
    """`[model]` of `type = "hunyuan_dit"`."""

    vlb_weight: NotNegative = 0.0
    """Weight of the variational term, from which the model learns the variance of a step: 0.001 is usual (Nichol and
    Dhariwal 2021), 0 leaves the term out. Stock samplers do not use this variance."""


class HunyuanDitInputs(NamedTuple):
    """The inputs of the entry. `bert_BLD` is only padded to the longest caption of the batch; `sizes_B6` is None for
    a model without sizes."""

    x_BChw: torch.Tensor
    bert_BLD: torch.Tensor
    bert_mask_BL: torch.Tensor
    mt5_BLE: torch.Tensor
    mt5_mask_BL: torch.Tensor
    step_B: torch.Tensor
    rope_TH: tuple[torch.Tensor, torch.Tensor]
    sizes_B6: torch.Tensor | None


class HunyuanDitStream(NamedTuple):
    """What travels from layer to layer. `skips` are outputs of blocks in the first half, the last one on top;
    `canvas_hw0` has no elements: its shape carries the latent's height and width."""

    x_BTD: torch.Tensor
    skips: tuple[torch.Tensor, ...]
    text_BLD: torch.Tensor
    time_BD: torch.Tensor
    rope_TH: tuple[torch.Tensor, torch.Tensor]
    canvas_hw0: torch.Tensor


class Entry(nn.Module):
    """Embeds patches, text, and time with the other conditions; learned tokens follow the end of a caption."""

    def __init__(self, denoiser: HunyuanDiT2DModel):
        super().__init__()
        self.pos_embed = denoiser.pos_embed
        self.time_extra_emb = denoiser.time_extra_emb
        self.text_embedder = denoiser.text_embedder
        self.text_embedding_padding = denoiser.text_embedding_padding

    def forward(self, inputs: HunyuanDitInputs) -> HunyuanDitStream:
        dtype, sizes_B6 = self.text_embedding_padding.dtype, inputs.sizes_B6
        mt5_BLE = inputs.mt5_BLE.to(dtype)
        style_B = None if sizes_B6 is None else torch.zeros(len(sizes_B6), dtype=torch.int64, device=sizes_B6.device)
        return HunyuanDitStream(
            x_BTD=self.pos_embed(inputs.x_BChw.to(dtype)).contiguous(),
            skips=(),
            text_BLD=self._text(inputs, mt5_BLE),
            # Time and sizes stay float32 until they are embedded.
            time_BD=self.time_extra_emb(inputs.step_B, mt5_BLE, sizes_B6, style_B, hidden_dtype=dtype),
            rope_TH=inputs.rope_TH,
            canvas_hw0=mt5_BLE.new_empty(*inputs.x_BChw.shape[2:], 0),
        )

    def _text(self, inputs: HunyuanDitInputs, mt5_BLE: torch.Tensor) -> torch.Tensor:
        """The tokens of BERT followed by those of mT5, with learned tokens instead of the padding of each."""
        missing = len(self.text_embedding_padding) - inputs.bert_BLD.shape[1] - mt5_BLE.shape[1]
        bert_BLD = functional.pad(inputs.bert_BLD.to(mt5_BLE.dtype), (0, 0, 0, missing))
        bert_mask_BL = functional.pad(inputs.bert_mask_BL, (0, missing))
        mt5_BLD = self.text_embedder(mt5_BLE.flatten(0, 1)).unflatten(0, mt5_BLE.shape[:2])
        mask_BL = torch.cat([bert_mask_BL, inputs.mt5_mask_BL], dim=1)
        text_BLD = torch.cat([bert_BLD, mt5_BLD], dim=1)
        return torch.where(mask_BL[..., None], text_BLD, self.text_embedding_padding)


class Block(nn.Module):
    """A block that may push its output onto the stack, or pop the top of the stack as a skip connection."""

    recomputable = True

    def __init__(self, block: nn.Module, *, pushes: bool, pops: bool):
        super().__init__()
        self.block, self.pushes, self.pops = block, pushes, pops

    def forward(self, stream: HunyuanDitStream) -> HunyuanDitStream:
        skips, skip = (stream.skips[:-1], stream.skips[-1]) if self.pops else (stream.skips, None)
        x_BTD = self.block(
            hidden_states=stream.x_BTD,
            encoder_hidden_states=stream.text_BLD,
            temb=stream.time_BD,
            image_rotary_emb=stream.rope_TH,
            skip=skip,
        )
        return stream._replace(x_BTD=x_BTD, skips=(*skips, x_BTD) if self.pushes else skips)


class Exit(nn.Module):
    """Projects the tokens to v and the variance (B, 2C, h, w)."""

    def __init__(self, denoiser: HunyuanDiT2DModel):
        super().__init__()
        self.norm_out = denoiser.norm_out
        self.proj_out = denoiser.proj_out

    def forward(self, stream: HunyuanDitStream) -> torch.Tensor:
        height, width, _ = stream.canvas_hw0.shape
        return unpatchify(self.proj_out(self.norm_out(stream.x_BTD, stream.time_BD.float())), height, width)


class HunyuanDitPipeline(PicturePipeline):
    """HunyuanDiT of Tencent, 1.0 to 1.2, which reads Chinese and English. Where a picture is not square, the positions
    of its tokens are those of its publisher and of ComfyUI; diffusers' are up to an eighth of a token beside them."""

    Options = HunyuanDitOptions
    denoiser_class = "HunyuanDiT2DModel"
    config_keys = (
        "attention_head_dim",
        "cross_attention_dim",
        "cross_attention_dim_t5",
        "in_channels",
        "text_len",
        "text_len_t5",
    )
    text_parts = (
        TextPart(
            "bert",
            "BertModel",
            names=CheckpointNames("text_encoders.hydit_clip.transformer."),
            # The model's files may lack the pooling layer.
            arguments={"add_pooling_layer": False},
        ),
        TextPart(
            "mt5",
            "T5EncoderModel",
            "text_encoder_2",
            "tokenizer_2",
            names=CheckpointNames("text_encoders.mt5xl.transformer."),
            model_types=("t5", "mt5"),
        ),
    )
    scheduler_sets_levels = True
    blocks = ("blocks",)
    stream_type = HunyuanDitStream
    original_layout = ORIGINAL_LAYOUT
    guided_by_second_prediction = True

    @cached_property
    def objective(self) -> Epsilon:
        return ddpm_objective(self.options, learns_sigma=True)

    @property
    def variational_weight(self) -> float:
        return self.options.vlb_weight

    def problems_of_parts(self) -> Iterator[Problem]:
        config, channels = self.parts.denoiser_config, self.vae_config["latent_channels"]
        widths = [encoder.shapes[encoder.name][1] for encoder in self._text_encoders()]
        asked = [config["cross_attention_dim"], config["cross_attention_dim_t5"]]
        if not config.get("learn_sigma", True):
            yield self.parts.misfit("predicts no variance (learn_sigma), as HunyuanDiT does")
        if config["in_channels"] != channels:
            yield self.parts.misfit(
                f"takes latents of {config['in_channels']} channels and the VAE makes {channels}; give SDXL's VAE"
            )
        if asked != widths:
            yield self.parts.misfit(
                f"takes text of {asked} features, and the encoders make {widths}; give HunyuanDiT's own"
            )
        if not self.options.from_scratch:
            yield from self._problems_of_version()

    def _problems_of_version(self) -> Iterator[Problem]:
        names = read_header(self.parts.denoiser_path, with_gguf=True).files
        is_hunyuan_dit, is_told_sizes = (any(name.endswith(key) for name in names) for key in (PADDING_KEY, STYLE_KEY))
        if is_hunyuan_dit and is_told_sizes != self._is_told_sizes:
            message = (
                f"is HunyuanDiT {VERSIONS[is_told_sizes]}, and the folder's configuration is that of "
                f"{VERSIONS[self._is_told_sizes]}; give the folder of the same version"
            )
            yield Problem(str(self.parts.denoiser_path), "", message)

    def encoders(self, controls: int = 0) -> list[ModelEncoder]:
        return [self.autoencoder(), *self._text_encoders(), *([SizeEncoder()] if self._is_told_sizes else [])]

    def _text_encoders(self) -> list[TextEncoder]:
        config = self.parts.denoiser_config
        return [
            self.parts.text_encoder(TrueLengthFeatures("bert", config["text_len"])),
            self.parts.text_encoder(PaddedFeatures("mt5", config["text_len_t5"])),
        ]

    def to_layers(self, denoiser: HunyuanDiT2DModel) -> list[nn.Module]:
        half = len(denoiser.blocks) // 2
        blocks = [Block(block, pushes=n < half - 1, pops=n > half) for n, block in enumerate(denoiser.blocks)]
        return [Entry(denoiser), *blocks, Exit(denoiser)]

    def prepare_inputs(
        self, features: Features, x_t: torch.Tensor, t_B: torch.Tensor, guidance: float | None = None
    ) -> HunyuanDitInputs:
        return HunyuanDitInputs(
            x_BChw=x_t,
            bert_BLD=features["bert"],
            bert_mask_BL=features["bert_mask"].bool(),
            mt5_BLE=features["mt5"],
            mt5_mask_BL=features["mt5_mask"].bool(),
            step_B=self.objective.model_time(t_B),
            rope_TH=rotary_tables(*x_t.shape[2:], self.parts.denoiser_config["attention_head_dim"]),
            sizes_B6=self._sizes(features, x_t) if self._is_told_sizes else None,
        )

    def _sizes(self, features: Features, x_t: torch.Tensor) -> torch.Tensor:
        """The sizes for the model (B, 6), in pixels."""
        height, width = (side * self.cell for side in x_t.shape[2:])
        drawn = torch.tensor([USUAL_SIDE, USUAL_SIDE, 0, 0, height, width], dtype=torch.float32).repeat(len(x_t), 1)
        return features.get(SIZES, drawn)[:, WIDTH_FIRST]

    def scheduler(self) -> Any:
        return ddpm_scheduler(self.options)

    @property
    def _is_told_sizes(self) -> bool:
        return self.parts.denoiser_config.get("use_style_cond_and_image_meta_size", True)


def rotary_tables(height: int, width: int, features: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines (T, H) of the positions of a latent's tokens, which are scaled and centred so that every
    picture fills the longer side of a grid.

    They divide the picture's extent evenly, as in the training of its publisher (Tencent's HunyuanDiT, `get_meshgrid`
    of hydit/modules/posemb_layers.py) and in ComfyUI. diffusers shortens the end of the extent and not its length,
    which is the same for a picture that begins at 0, and for others off by up to their beginning / their number of
    tokens.
    """
    from diffusers.models.embeddings import get_2d_rotary_pos_embed_from_grid
    from diffusers.pipelines.hunyuandit.pipeline_hunyuandit import get_resize_crop_region_for_grid

    grid = (height // PATCH, width // PATCH)
    starts, stops = get_resize_crop_region_for_grid(grid, ROTARY_GRID)
    rows, columns = (
        (torch.arange(count, dtype=torch.float64) * ((stop - start) / count) + start).float()
        for start, stop, count in zip(starts, stops, grid, strict=True)
    )
    # The publisher calls the columns first.
    positions = torch.stack(torch.meshgrid(columns, rows, indexing="xy"))
    return get_2d_rotary_pos_embed_from_grid(features, positions, use_real=True)
