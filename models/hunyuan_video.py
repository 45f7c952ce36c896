"""HunyuanVideo: blocks with two streams, then blocks in which video and text are one sequence.

Models of text to video are trained on pictures and clips together. Models of picture to video see the first frame
through LLaVA beside the caption, and have it as the first frame of the latent: either in place of the noisy one, with a
time of its own (`token_replace`), or as further channels (`latent_concat`).

Shapes: B batch, C latent channels, f h w latent frames, height and width, T video tokens, L text tokens, S = T + L,
D width of the transformer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from einops import rearrange
from torch import nn

from models.base import BasePipeline, Features, ModelEncoder
from models.families.clips import SeesFrames, problems_of_halves, problems_of_stills
from models.foundation.checkpoints.configs import stock_scheduler
from models.foundation.checkpoints.folders import TextPart
from models.foundation.checkpoints.headers import read_header
from models.foundation.checkpoints.layouts.hunyuan_video import HUNYUAN_VIDEO_LAYOUT
from models.foundation.checkpoints.recognition import FRAMEPACK, recognised
from models.foundation.encoders.hunyuan_prompts import OF_A_PICTURE, OF_A_PICTURE_TOKENS, video_prompt
from models.foundation.encoders.hunyuan_vae import (
    HUNYUAN_VIDEO,
    HunyuanFirstFrame,
    HunyuanVideoAutoencoder,
    hunyuan_latent_size,
)
from models.foundation.encoders.llava import LlavaEncoder, PicturePrompt
from models.foundation.encoders.text import TextEncoder
from models.foundation.encoders.text_features import ClipPooled
from models.foundation.layers.chain import Middle
from models.foundation.layers.given import beside_first_frame
from models.foundation.layers.padding import mask_behind
from models.foundation.layers.patches import blank_latent
from utils.dataset.buckets import MediaFacts
from utils.dataset.samples import Sample
from utils.diffusion.objectives import FlowMatching
from utils.errors import Problem, UserError
from utils.json_files import read_json
from utils.settings.values import Count

if TYPE_CHECKING:
    from diffusers import FlowMatchEulerDiscreteScheduler, HunyuanVideoTransformer3DModel

PATCH = 2
TRAIN_STEPS = 1000
REPLACED, CONCATENATED = "token_replace", "latent_concat"
STRIDES = {REPLACED: 4, CONCATENATED: 2}
"""How the first frame is given (`image_condition_type`) -> which of its tokens the model sees: every so manieth."""
PICTURE_IN_NOISE = 0.001
"""The part of the first frame in all frames of the noise with which a sample of picture to video begins."""
CLIP = TextPart("clip", "CLIPTextModel", "text_encoder_2", "tokenizer_2")


class HunyuanVideoOptions(SeesFrames):
    """`[model]` of `type = "hunyuan_video"`."""

    guidance: float = 1.0
    """Guidance embedded in training (models with a guidance embedding only); 1 trains the plain conditional flow."""
    max_sequence_length: Count = 256
    """Number of Llama tokens of a caption that are read."""


class HunyuanVideoInputs(NamedTuple):
    """The inputs of the entry. Without a mask, no text is padded."""

    x_BCfhw: torch.Tensor
    text_BLD: torch.Tensor
    text_mask_BL: torch.Tensor | None
    pooled_BD: torch.Tensor
    t_B: torch.Tensor
    guidance_B: torch.Tensor | None


class HunyuanVideoStream(NamedTuple):
    """What travels from layer to layer. `canvas_fhw0` has no elements: its shape carries the tokens' grid. A first
    frame that is in place of the noisy one has a time of its own."""

    x_BTD: torch.Tensor
    text_BLD: torch.Tensor
    mask_B11S: torch.Tensor | None
    time_BD: torch.Tensor
    first_time_BD: torch.Tensor | None
    rope_TD: tuple[torch.Tensor, torch.Tensor]
    canvas_fhw0: torch.Tensor

    @property
    def tokens_of_first(self) -> int:
        """The number of tokens of the first frame."""
        _, height, width, _ = self.canvas_fhw0.shape
        return height * width


class Entry(nn.Module):
    """Embeds patches, time and positions, and refines the text. Each stage makes the rotary tables itself."""

    remakes = ("rope_TD",)

    def __init__(self, denoiser: HunyuanVideoTransformer3DModel):
        super().__init__()
        self.rope = denoiser.rope
        self.x_embedder = denoiser.x_embedder
        self.context_embedder = denoiser.context_embedder
        self.time_text_embed = denoiser.time_text_embed
        self.patch = (denoiser.config.patch_size_t, denoiser.config.patch_size, denoiser.config.patch_size)

    def forward(self, inputs: HunyuanVideoInputs) -> HunyuanVideoStream:
        dtype = self.x_embedder.proj.weight.dtype
        x_BCfhw, mask_BL = inputs.x_BCfhw.to(dtype), inputs.text_mask_BL
        x_BTD = self.x_embedder(x_BCfhw)
        # Time and guidance stay float32 until they are embedded: bfloat16 would round 0..1000 to steps of 4.
        time_BD, first_time_BD = self.time_text_embed(inputs.t_B, inputs.pooled_BD.to(dtype), inputs.guidance_B)
        grid = [side // patch for side, patch in zip(x_BCfhw.shape[2:], self.patch, strict=True)]
        return HunyuanVideoStream(
            x_BTD=x_BTD,
            text_BLD=self.context_embedder(inputs.text_BLD.to(dtype), inputs.t_B, mask_BL),
            mask_B11S=None if mask_BL is None else mask_behind(mask_BL, x_BTD.shape[1]),
            time_BD=time_BD,
            first_time_BD=first_time_BD,
            rope_TD=self.rope(x_BCfhw),
            canvas_fhw0=torch.empty(*grid, 0, device=x_BTD.device),
        )

    def remake(self, stream: HunyuanVideoStream) -> dict[str, Any]:
        """The fields that are not sent from stage to stage."""
        return {"rope_TD": self.rope(blank_latent(stream.canvas_fhw0, self.patch))}


class Exit(nn.Module):
    """Projects the video tokens to the latent (B, C, f, h, w)."""

    def __init__(self, denoiser: HunyuanVideoTransformer3DModel):
        super().__init__()
        self.norm_out = denoiser.norm_out
        self.proj_out = denoiser.proj_out
        self.patch = (denoiser.config.patch_size_t, denoiser.config.patch_size, denoiser.config.patch_size)

    def forward(self, stream: HunyuanVideoStream) -> torch.Tensor:
        x_BTC = self.proj_out(self.norm_out(stream.x_BTD, stream.time_BD))
        frames, height, width, _ = stream.canvas_fhw0.shape
        return rearrange(
            x_BTC,
            "b (f h w) (c p q r) -> b c (f p) (h q) (w r)",
            **dict(zip("fhwpqr", (frames, height, width, *self.patch), strict=True)),
        )


class HunyuanVideoPipeline(BasePipeline):
    """HunyuanVideo of Tencent: text to video, and both models of picture to video. Samples of the one with 33 channels
    keep the first four frames, which inference cuts off."""

    Options = HunyuanVideoOptions
    denoiser_class = "HunyuanVideoTransformer3DModel"
    noise_in_float32 = True
    config_keys = ("in_channels", "pooled_projection_dim", "text_embed_dim")
    media = MediaFacts(spatial=16, temporal=4, max_frames=257, fps=24.0)
    objective = FlowMatching(time_scale=TRAIN_STEPS)
    blocks = ("transformer_blocks", "single_transformer_blocks")
    stream_type = HunyuanVideoStream
    original_layout = HUNYUAN_VIDEO_LAYOUT

    @cached_property
    def _condition(self) -> str | None:
        """How the first frame is given; None for a model of text to video."""
        # `check` reports a damaged configuration.
        with suppress(UserError):
            config = read_json(self.options.diffusers_path / self.denoiser_folder / "config.json")
            return config.get("image_condition_type")
        return None

    @property
    def starts_from_picture(self) -> bool:
        return self._condition is not None

    @property
    def text_parts(self) -> tuple[TextPart, ...]:
        return TextPart("llama", "LlavaModel" if self.starts_from_picture else "LlamaModel"), CLIP

    def problems_of_parts(self) -> Iterator[Problem]:
        config, made, condition = self.parts.denoiser_config, self._vae_config["latent_channels"], self._condition
        if condition not in (None, *STRIDES):
            yield self.parts.misfit(f"has `image_condition_type` {condition}; known are {', '.join(STRIDES)}, and none")
            return
        yield from problems_of_halves(self.options, "llama", sees=self.starts_from_picture)
        takes = 2 * made + 1 if condition == CONCATENATED else made
        if config["in_channels"] != takes:
            yield self.parts.misfit(
                f"takes {config['in_channels']} channels, and the VAE makes {made}, of which a model with "
                f"`image_condition_type` {condition or 'null'} takes {takes}; give HunyuanVideo of Tencent, with its "
                "own VAE"
            )
        yield from self._problems_of_widths()
        yield from self._problems_of_relatives()

    def _problems_of_relatives(self) -> Iterator[Problem]:
        """FramePack has all tensors of HunyuanVideo, and its own."""
        path = self.parts.denoiser_path
        found = None if self.options.from_scratch else recognised(read_header(path, with_gguf=True).shapes)
        if found and found.what == FRAMEPACK:
            yield Problem(str(path), "", f"holds {found.what}: {found.fits}")

    def _problems_of_widths(self) -> Iterator[Problem]:
        """Text encoders that make something else than the denoiser reads."""
        config = self.parts.denoiser_config
        _, read = self._text_encoder().shapes["llama"]
        widths = {"text_embed_dim": read, "pooled_projection_dim": self.parts.text_config("clip")["hidden_size"]}
        for (key, width), what in zip(widths.items(), ("LLaVA-Llama-3-8B", "CLIP-L"), strict=True):
            if config[key] != width:
                yield self.parts.misfit(f"has `{key}` {config[key]}, and its text encoder makes {width}; give {what}")

    def problems_of_data(self, samples: Sequence[Sample]) -> list[Problem]:
        return problems_of_stills(samples) if self.starts_from_picture else []

    def encoders(self, controls: int = 0) -> list[ModelEncoder]:
        options = self.options
        vae = (options.diffusers_path, options.vae_path, self.dtype)
        return [
            HunyuanVideoAutoencoder(*vae, draw=options.latents),
            self._text_encoder(),
            self.parts.text_encoder(ClipPooled()),
            *([HunyuanFirstFrame(*vae)] if self.starts_from_picture else []),
        ]

    def _text_encoder(self) -> TextEncoder:
        """What reads the caption, of picture to video together with the first frame."""
        length, condition = self.options.max_sequence_length, self._condition
        if condition is None:
            return self.parts.text_encoder(video_prompt("llama", length))
        skipped = OF_A_PICTURE_TOKENS
        prompt = PicturePrompt("llama", OF_A_PICTURE, skipped, skipped + length, stride=STRIDES.get(condition, 1))
        return self.parts.text_encoder(prompt, LlavaEncoder, vision=self.options.image_encoder_path)

    def to_layers(self, denoiser: HunyuanVideoTransformer3DModel) -> list[nn.Module]:
        reads = {
            "hidden_states": "x_BTD",
            "encoder_hidden_states": "text_BLD",
            "temb": "time_BD",
            "attention_mask": "mask_B11S",
            # Blocks of models without such a frame pass over these.
            "token_replace_emb": "first_time_BD",
            "num_tokens": "tokens_of_first",
        }
        lists = {"freqs_cis": denoiser.transformer_blocks, "image_rotary_emb": denoiser.single_transformer_blocks}
        middles = [
            Middle(block, {**reads, positions: "rope_TD"}, writes=("x_BTD", "text_BLD"))
            for positions, blocks in lists.items()
            for block in blocks
        ]
        return [Entry(denoiser), *middles, Exit(denoiser)]

    def prepare_inputs(
        self, features: Features, x_t: torch.Tensor, t_B: torch.Tensor, guidance: float | None = None
    ) -> HunyuanVideoInputs:
        mask_BL, embeds = features["llama_mask"].bool(), self.parts.denoiser_config.get("guidance_embeds", True)
        strength = self.options.guidance if guidance is None else guidance
        return HunyuanVideoInputs(
            x_BCfhw=self._with_first_frame(x_t, features),
            text_BLD=features["llama"],
            # With a mask, even of ones, attention is slower.
            text_mask_BL=None if mask_BL.all() else mask_BL,
            pooled_BD=features["clip_pooled"],
            t_B=self.objective.model_time(t_B),
            guidance_B=torch.full((len(x_t),), strength * TRAIN_STEPS) if embeds else None,
        )

    def _with_first_frame(self, x_t: torch.Tensor, features: Features) -> torch.Tensor:
        """What the model sees of a noised latent (B, C, f, h, w)."""
        if not self.starts_from_picture:
            return x_t
        first = features["first_frame_latents"].to(x_t)
        if self._condition == REPLACED:
            return torch.cat([first, x_t[:, :, 1:]], dim=2)
        return beside_first_frame(x_t, first)

    def before_steps(self, noise: torch.Tensor, features: Features) -> torch.Tensor:
        if not self.starts_from_picture:
            return noise
        return torch.lerp(noise, features["first_frame_latents"].to(noise).expand_as(noise), PICTURE_IN_NOISE)

    def after_steps(self, latents: torch.Tensor, features: Features) -> torch.Tensor:
        # Its own first frame has never been seen.
        return self._with_first_frame(latents, features) if self._condition == REPLACED else latents

    def given_frames(self, latent_shape: Sequence[int], quantile: float) -> int:
        return int(self._condition == REPLACED)

    def tokens(self, latent_shape: Sequence[int]) -> int:
        *_, height, width = latent_shape
        return (height // PATCH) * (width // PATCH)

    def latent_shape(self, width: int, height: int, frames: int = 1) -> tuple[int, ...]:
        return hunyuan_latent_size(self._vae_config, width, height, frames)

    def scheduler(self) -> FlowMatchEulerDiscreteScheduler:
        return stock_scheduler(self.options.diffusers_path, "FlowMatchEulerDiscreteScheduler")

    # Kept, as every micro-batch asks for it.
    @cached_property
    def _vae_config(self) -> dict[str, Any]:
        return HUNYUAN_VIDEO.config(self.options.diffusers_path, self.options.vae_path)
