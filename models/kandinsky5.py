"""Kandinsky 5: blocks that refine the text, then blocks of the picture or clip, which look at it.

Models of text to video are trained on pictures and clips together, and are told that no frame is given; models of
picture to video have the first frame in place of the noisy one. Models of text to image have Flux's VAE.

Shapes: B batch, C latent channels, f h w latent frames, height and width, T tokens of picture or clip, L text tokens,
D width of the transformer (of the time: its own), E rotary features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import torch
from einops import rearrange
from pydantic import Field
from torch import nn

from models.base import BasePipeline, Features, ModelEncoder
from models.families.clips import problems_of_stills
from models.foundation.checkpoints.configs import stock_scheduler
from models.foundation.checkpoints.folders import TextPart, model_index
from models.foundation.checkpoints.layouts.kandinsky5 import KANDINSKY5_LAYOUT
from models.foundation.encoders.hunyuan_vae import (
    HUNYUAN_VIDEO,
    HunyuanFirstFrame,
    HunyuanVideoAutoencoder,
    hunyuan_latent_size,
)
from models.foundation.encoders.kandinsky_prompts import CleanedClipPooled, kandinsky_prompt
from models.foundation.encoders.text import TextEncoder
from models.foundation.encoders.vae import ImageAutoencoder, UnshiftedAutoencoder, vae_config
from models.foundation.layers.chain import Middle
from models.foundation.layers.given import beside_first_frame
from models.foundation.layers.kandinsky import OfTexts, OwnTextAttention, mended
from utils.dataset.buckets import MediaFacts
from utils.dataset.samples import Sample
from utils.diffusion.objectives import FlowMatching
from utils.errors import Problem, UserError
from utils.json_files import read_json
from utils.settings.model_schema import ModelSettings

if TYPE_CHECKING:
    from diffusers import FlowMatchEulerDiscreteScheduler, Kandinsky5Transformer3DModel

TEXT, CLIP = "qwen2_5_vl", "clip"
PATCH = 2
TRAIN_STEPS = 1000
PLACES, TEXT_PLACES = (128, 128), 1024
"""Rows and columns of the tables of positions of tokens, and places of text tokens."""
OF_480_LINES = range(480, 855)
"""Sides of clips whose positions are half as far apart as those of tokens."""
SPREAD, SPREAD_OF_OTHERS = 2.0, 3.16
FROM_PICTURE, EDITING = "Kandinsky5I2VPipeline", "Kandinsky5I2IPipeline"


class Kandinsky5Options(ModelSettings):
    """`[model]` of `type = "kandinsky5"`.

    Inference takes evenly spaced noise levels, shifted by its scheduler's `shift`, which the `scheduler` of the folder
    has: `shift` set to that trains where samples are drawn. Train a model that is called sft or pretrain: those that
    were distilled to need no guidance (nocfg) or fewer steps look the same in their files, and plain training undoes
    that little by little.
    """

    max_sequence_length: Annotated[int, Field(ge=1, le=TEXT_PLACES)] = 512
    """Number of Qwen2.5-VL tokens of a caption that are read, with the one that ends it; at most 1024, for which the
    model has places."""


class Kandinsky5Inputs(NamedTuple):
    """The inputs of the entry. `text_lengths` as in `OfTexts`."""

    x_BCfhw: torch.Tensor
    text_BLD: torch.Tensor
    text_lengths: tuple[torch.Tensor, ...] | None
    pooled_BD: torch.Tensor
    t_B: torch.Tensor


class Kandinsky5Stream(NamedTuple):
    """What travels from layer to layer. `canvas_fhw0` has no elements: its shape carries the tokens' grid."""

    x_BTD: torch.Tensor
    text_BLD: torch.Tensor
    text_lengths: tuple[torch.Tensor, ...] | None
    time_BD: torch.Tensor
    text_rope_1L1E22: torch.Tensor
    rope_1T1E22: torch.Tensor
    canvas_fhw0: torch.Tensor

    @property
    def text(self) -> OfTexts:
        """What the picture looks at."""
        return OfTexts(self.text_BLD, self.text_lengths)

    @property
    def text_rope(self) -> OfTexts:
        """What the blocks of the text are told of its places."""
        return OfTexts(self.text_rope_1L1E22, self.text_lengths)

    @property
    def sparse_params(self) -> None:
        """All tokens see each other."""
        return None


class Entry(nn.Module):
    """Embeds patches, texts, time and positions. Each stage makes the pictures' rotary table itself.

    Args:
        scale: height and width of a latent -> the distance of the tokens' positions in time and both directions, by
            which they are divided.
    """

    remakes = ("rope_1T1E22",)

    def __init__(self, denoiser: Kandinsky5Transformer3DModel, scale: Callable[[int, int], tuple[float, ...]]):
        super().__init__()
        self.time_embeddings = denoiser.time_embeddings
        self.text_embeddings = denoiser.text_embeddings
        self.pooled_text_embeddings = denoiser.pooled_text_embeddings
        self.visual_embeddings = denoiser.visual_embeddings
        self.text_rope_embeddings = denoiser.text_rope_embeddings
        self.visual_rope_embeddings = denoiser.visual_rope_embeddings
        self.scale = scale

    def forward(self, inputs: Kandinsky5Inputs) -> Kandinsky5Stream:
        dtype, device = self.visual_embeddings.in_layer.weight.dtype, inputs.x_BCfhw.device
        x_BfhwC = rearrange(inputs.x_BCfhw.to(dtype), "b c f h w -> b f h w c").contiguous()
        x_BfhwD, text_BLD = self.visual_embeddings(x_BfhwC), self.text_embeddings(inputs.text_BLD.to(dtype))
        grid = x_BfhwD.shape[1:4]
        # A plain attribute, which no move of the module takes along.
        self.time_embeddings.freqs = self.time_embeddings.freqs.to(device)
        # The time stays float32 until it is embedded: bfloat16 would round 0..1000 to steps of 4.
        time_BD = self.time_embeddings(inputs.t_B) + self.pooled_text_embeddings(inputs.pooled_BD.to(dtype))
        canvas_fhw0 = torch.empty(*grid, 0, device=device)
        return Kandinsky5Stream(
            x_BTD=x_BfhwD.flatten(1, 3),
            text_BLD=text_BLD,
            text_lengths=inputs.text_lengths,
            time_BD=time_BD,
            text_rope_1L1E22=self.text_rope_embeddings(torch.arange(text_BLD.shape[1], device=device)).unsqueeze(0),
            rope_1T1E22=self._rope(canvas_fhw0),
            canvas_fhw0=canvas_fhw0,
        )

    def remake(self, stream: Kandinsky5Stream) -> dict[str, Any]:
        """The fields that are not sent from stage to stage."""
        return {"rope_1T1E22": self._rope(stream.canvas_fhw0)}

    def _rope(self, canvas_fhw0: torch.Tensor) -> torch.Tensor:
        device, (*grid, _) = canvas_fhw0.device, canvas_fhw0.shape
        places = [torch.arange(side, device=device) for side in grid]
        # On a stage without the entry its tables are where they were built.
        rope = self.visual_rope_embeddings.to(device)
        return rope((1, *grid), places, self.scale(*(side * PATCH for side in grid[1:]))).flatten(1, 3)


class Exit(nn.Module):
    """Projects the tokens to the latent (B, C, f, h, w), of a model of pictures (B, C, h, w)."""

    def __init__(self, denoiser: Kandinsky5Transformer3DModel, *, of_pictures: bool):
        super().__init__()
        self.out_layer = denoiser.out_layer
        self.of_pictures = of_pictures

    def forward(self, stream: Kandinsky5Stream) -> torch.Tensor:
        x_BfhwD = stream.x_BTD.unflatten(1, stream.canvas_fhw0.shape[:3])
        # It takes the text, and makes no use of it.
        x_BCfhw = rearrange(self.out_layer(x_BfhwD, None, stream.time_BD), "b f h w c -> b c f h w")
        return (x_BCfhw.squeeze(2) if self.of_pictures else x_BCfhw).contiguous()


class Kandinsky5Pipeline(BasePipeline):
    """Kandinsky 5.0 of Kandinsky Lab: text to video, picture to video, and text to image, which is trained on pictures
    alone. Models with sparse attention (NABLA), such as those of 10 seconds, are not trained, nor is the one that edits
    pictures. Inference of text to image takes the nearest of seven sizes; samples are drawn at the size that is asked
    for."""

    Options = Kandinsky5Options
    denoiser_class = "Kandinsky5Transformer3DModel"
    config_keys = ("in_text_dim", "in_text_dim2", "in_visual_dim", "out_visual_dim", "patch_size")
    text_parts = (
        TextPart(TEXT, "Qwen2_5_VLModel"),
        TextPart(CLIP, "CLIPTextModel", "text_encoder_2", "tokenizer_2"),
    )
    media = MediaFacts(spatial=16, temporal=4, max_frames=241, fps=24.0)
    objective = FlowMatching(time_scale=TRAIN_STEPS)
    scheduler_sets_levels = True
    blocks = ("text_transformer_blocks", "visual_transformer_blocks")
    cross_attention = ("cross_attention",)
    stream_type = Kandinsky5Stream
    # Those of the stock class, and what it applies to float32, which no fused kernel does with other weights.
    keep_in_high_precision = ("time_embeddings.", "modulation.", "query_norm.", "key_norm.")
    original_layout = KANDINSKY5_LAYOUT
    guided_by_second_prediction = True
    places = PLACES

    def __init__(self, options: Kandinsky5Options, seed: int = 0):
        super().__init__(options, seed)
        if self.of_pictures:
            self.media = MediaFacts(spatial=self.media.spatial)

    @cached_property
    def of_pictures(self) -> bool:
        """Whether it makes still pictures alone, as its VAE does."""
        # `check` reports a damaged configuration.
        with suppress(UserError):
            return read_json(self.options.diffusers_path / "vae" / "config.json").get("_class_name") == "AutoencoderKL"
        return False

    @cached_property
    def _pipeline(self) -> str | None:
        """The stock pipeline that the folder names."""
        with suppress(UserError):
            return model_index(self.options.diffusers_path).get("_class_name")
        return None

    @property
    def starts_from_picture(self) -> bool:
        return self._pipeline == FROM_PICTURE

    @property
    def _is_told_frames(self) -> bool:
        """Whether the model has channels that say which frames are given."""
        return bool(self.parts.denoiser_config.get("visual_cond"))

    def problems_of_parts(self) -> Iterator[Problem]:
        config, made = self.parts.denoiser_config, self._vae_config["latent_channels"]
        if self._pipeline == EDITING or (self.of_pictures and self._is_told_frames):
            yield self.parts.misfit(
                "is of the model that edits pictures, which is not trained here; give text to image"
            )
            return
        if config.get("attention_type") == "nabla":
            yield self.parts.misfit(
                "has sparse attention (`attention_type` nabla), which is not trained here; give a model whose "
                "`attention_type` is regular"
            )
        if list(config["patch_size"]) != [1, PATCH, PATCH]:
            yield self.parts.misfit(f"has patches of {config['patch_size']}; give Kandinsky 5, whose are [1, 2, 2]")
        if (config["in_visual_dim"], config["out_visual_dim"]) != (made, made):
            yield self.parts.misfit(
                f"takes latents of {config['in_visual_dim']} channels, gives {config['out_visual_dim']}, and the VAE "
                f"makes {made}; give Kandinsky 5 and its own VAE"
            )
        widths = {"in_text_dim": self._prompt().shapes[TEXT][-1], "in_text_dim2": self._clip().shapes["clip_pooled"][0]}
        for (key, width), what in zip(widths.items(), ("Qwen2.5-VL 7B", "CLIP-L"), strict=True):
            if config[key] != width:
                yield self.parts.misfit(f"has `{key}` {config[key]}, and its text encoder makes {width}; give {what}")

    def problems_of_data(self, samples: Sequence[Sample]) -> list[Problem]:
        return problems_of_stills(samples) if self.starts_from_picture else []

    def encoders(self, controls: int = 0) -> list[ModelEncoder]:
        folder, options = self.options.diffusers_path, self.options
        first_frame = [HunyuanFirstFrame(folder, options.vae_path, self.dtype)] if self.starts_from_picture else []
        return [self._autoencoder(), self._prompt(), self._clip(), *first_frame]

    def _autoencoder(self) -> ImageAutoencoder:
        options = self.options
        kind = UnshiftedAutoencoder if self.of_pictures else HunyuanVideoAutoencoder
        return kind(options.diffusers_path, options.vae_path, self.dtype, draw=options.latents)

    def _prompt(self) -> TextEncoder:
        length = self.options.max_sequence_length
        return self.parts.text_encoder(kandinsky_prompt(TEXT, length, of_pictures=self.of_pictures))

    def _clip(self) -> TextEncoder:
        return self.parts.text_encoder(CleanedClipPooled())

    def build_denoiser(self) -> Kandinsky5Transformer3DModel:
        denoiser = super().build_denoiser()
        of_pictures = [block.cross_attention for block in denoiser.visual_transformer_blocks]
        for attention in [*of_pictures, *(block.self_attention for block in denoiser.text_transformer_blocks)]:
            attention.set_processor(OwnTextAttention(attention.processor))
        return denoiser

    def to_layers(self, denoiser: Kandinsky5Transformer3DModel) -> list[nn.Module]:
        of_text = {"x": "text_BLD", "time_embed": "time_BD", "rope": "text_rope"}
        of_pictures = {
            "visual_embed": "x_BTD",
            "text_embed": "text",
            "time_embed": "time_BD",
            "rope": "rope_1T1E22",
            "sparse_params": "sparse_params",
        }
        return [
            Entry(denoiser, self._scale),
            *(Middle(block, of_text, writes=("text_BLD",)) for block in denoiser.text_transformer_blocks),
            *(Middle(block, of_pictures, writes=("x_BTD",)) for block in denoiser.visual_transformer_blocks),
            Exit(denoiser, of_pictures=self.of_pictures),
        ]

    def _scale(self, height: int, width: int) -> tuple[float, float, float]:
        """By what the positions of a latent's tokens are divided, in time, down and across."""
        if self.of_pictures:
            return 1.0, 1.0, 1.0
        is_of_480_lines = all(side * self._cell in OF_480_LINES for side in (height, width))
        spread = SPREAD if is_of_480_lines else SPREAD_OF_OTHERS
        return 1.0, spread, spread

    def prepare_inputs(
        self, features: Features, x_t: torch.Tensor, t_B: torch.Tensor, guidance: float | None = None
    ) -> Kandinsky5Inputs:
        text_BLD, lengths = features[TEXT], features[f"{TEXT}_mask"].sum(dim=1).tolist()
        x_BCfhw = x_t.unsqueeze(2) if self.of_pictures else self._with_first_frame(x_t, features)
        if self._is_told_frames:
            # Of a given frame there is the mask alone.
            given = torch.zeros_like(x_BCfhw[:, :, :1]) if self.starts_from_picture else None
            x_BCfhw = beside_first_frame(x_BCfhw, given)
        return Kandinsky5Inputs(
            x_BCfhw=x_BCfhw,
            text_BLD=text_BLD,
            text_lengths=tuple(torch.empty(n, 0) for n in lengths) if min(lengths) < text_BLD.shape[1] else None,
            pooled_BD=features["clip_pooled"],
            t_B=self.objective.model_time(t_B),
        )

    def _with_first_frame(self, x_t: torch.Tensor, features: Features) -> torch.Tensor:
        """A latent (B, C, f, h, w) with the first frame, if that is given."""
        if not self.starts_from_picture:
            return x_t
        return torch.cat([features["first_frame_latents"].to(x_t), x_t[:, :, 1:]], dim=2)

    def given_frames(self, latent_shape: Sequence[int], quantile: float) -> int:
        return int(self.starts_from_picture)

    def before_steps(self, noise: torch.Tensor, features: Features) -> torch.Tensor:
        # Inference draws the noise with the channels innermost.
        return noise.reshape(len(noise), *noise.shape[2:], noise.shape[1]).moveaxis(-1, 1)

    def after_steps(self, latents: torch.Tensor, features: Features) -> torch.Tensor:
        return mended(self._with_first_frame(latents, features)) if self.starts_from_picture else latents

    def tokens(self, latent_shape: Sequence[int]) -> int:
        *_, height, width = latent_shape
        return (height // PATCH) * (width // PATCH)

    def latent_shape(self, width: int, height: int, frames: int = 1) -> tuple[int, ...]:
        if self.of_pictures:
            return self._vae_config["latent_channels"], height // self._cell, width // self._cell
        return hunyuan_latent_size(self._vae_config, width, height, frames)

    @property
    def _cell(self) -> int:
        """The side of a latent cell in pixels."""
        if self.of_pictures:
            return 2 ** (len(self._vae_config["block_out_channels"]) - 1)
        return self._vae_config["spatial_compression_ratio"]

    def scheduler(self) -> FlowMatchEulerDiscreteScheduler:
        return stock_scheduler(self.options.diffusers_path, "FlowMatchEulerDiscreteScheduler")

    # Kept, as every micro-batch asks for it.
    @cached_property
    def _vae_config(self) -> dict[str, Any]:
        config = vae_config if self.of_pictures else HUNYUAN_VIDEO.config
        return config(self.options.diffusers_path, self.options.vae_path)
