"""Qwen-Image 2.1: text and picture in one sequence, in which text sees what precedes it, and the picture all. Control
images stand in the text where its encoder saw them.

Shapes: B batch, T tokens of the noisy picture, L text tokens, P tokens of text and control images, S = P + T, K control
images, C latent channels, D width, H heads, E rotary angles, R rows of time embedding, h w latent cells.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from einops import rearrange
from torch import nn

from models.base import BasePipeline, Features, ModelEncoder
from models.foundation.checkpoints.configs import stock_scheduler
from models.foundation.checkpoints.folders import TextPart, model_index
from models.foundation.checkpoints.layouts.qwen_image_21 import QWEN_21_LAYOUT
from models.foundation.encoders.qwen_image_21_prompts import Caption, ControlledCaptionEncoder
from models.foundation.encoders.text import TextEncoder
from models.foundation.encoders.video_vae import QWEN_IMAGE_21, QwenImage21Autoencoder, latent_size
from models.foundation.layers.padding import without
from utils.dataset.buckets import MediaFacts
from utils.dataset.encoders import Encoder
from utils.dataset.inputs import control_names
from utils.dataset.samples import Sample
from utils.diffusion.timesteps import ResolutionShift
from utils.errors import Problem
from utils.settings.model_schema import ModelSettings
from utils.settings.run_tables import SamplingSettings
from utils.settings.values import Count

if TYPE_CHECKING:
    from diffusers import FlowMatchEulerDiscreteScheduler, QwenImage21Transformer2DModel
    from diffusers.models.transformers.transformer_qwenimage21 import QwenImage21Rope

TEXT = "qwen3_vl"
CONTROLS = control_names(10)
LATENTS = tuple(f"{name}_latents" for name in CONTROLS)
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
    """Number of tokens that are read of a caption with the words around it, beside those of control images; inference
    reads all."""


class QwenImage21Inputs(NamedTuple):
    """The inputs of the entry. `controls` are latents, and `places` tensors without elements, whose lengths are the
    numbers of text tokens before each. `lengths` are others, whose lengths are the numbers of a sample's own tokens
    before the noisy picture; None if no text is padded. The angles are those of each sample, or the same for all."""

    x_BCfhw: torch.Tensor
    controls: tuple[torch.Tensor, ...]
    places: tuple[torch.Tensor, ...]
    text_BLD: torch.Tensor
    lengths: tuple[torch.Tensor, ...] | None
    t_B: torch.Tensor
    rope_BSE: torch.Tensor


class QwenImage21Stream(NamedTuple):
    """What travels from layer to layer. With `causal_condition` the last row of times is that of text and control
    images, which are free of noise: R = B + 1. `controls` have no elements: the shape of each carries its first token
    and the number of its tokens, and that of `canvas_hw0` the latent's height and width."""

    x_BSD: torch.Tensor
    controls: tuple[torch.Tensor, ...]
    lengths: tuple[torch.Tensor, ...] | None
    time_RD: torch.Tensor
    modulation_RD: torch.Tensor
    rope_BSE: torch.Tensor
    canvas_hw0: torch.Tensor

    @property
    def given_tokens(self) -> int:
        """The number of tokens before the noisy picture, with padding."""
        height, width, _ = self.canvas_hw0.shape
        return self.x_BSD.shape[1] - height * width


class Rows(NamedTuple):
    """What attention is told of a stream; see there."""

    given_tokens: int
    controls: tuple[torch.Tensor, ...]
    lengths: tuple[torch.Tensor, ...] | None


class OwnTextAttention:
    """The stock attention of text and control images before a picture, where each sample has angles of its own, and its
    picture sees its own text without the padding of shorter texts in a batch. No kernel needs a mask for that."""

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self, attn: nn.Module, hidden_states: torch.Tensor, rotary_emb: torch.Tensor, segments: Rows, **unset: None
    ) -> torch.Tensor:
        """What is given, then the picture (B, S, D); `rotary_emb` are their angles (B, S, E), complex. The block also
        names what is for sampling with a cache."""
        from diffusers.models.attention_dispatch import dispatch_attention_fn

        q_BSHE, k_BSHE, v_BSHE = (
            project(hidden_states).unflatten(-1, (attn.heads, -1)) for project in (attn.to_q, attn.to_k, attn.to_v)
        )
        q_BSHE = turned(attn.norm_q(q_BSHE).to(v_BSHE.dtype), rotary_emb)
        k_BSHE = turned(attn.norm_k(k_BSHE).to(v_BSHE.dtype), rotary_emb)
        length, _, lengths = segments
        given_BPHE = self._given(q_BSHE, k_BSHE, v_BSHE, segments)
        if lengths is None:
            picture_BTHE = dispatch_attention_fn(q_BSHE[:, length:], k_BSHE, v_BSHE)
        else:
            pictures = []
            for number, own in enumerate(lengths):
                one = slice(number, number + 1)
                seen = (without(rows_BSHE[one], len(own), length) for rows_BSHE in (k_BSHE, v_BSHE))
                pictures.append(dispatch_attention_fn(q_BSHE[one, length:], *seen))
            picture_BTHE = torch.cat(pictures)
        mixed_BSHE = torch.cat([given_BPHE, picture_BTHE], dim=1)
        project, dropout = attn.to_out
        return dropout(project(mixed_BSHE.flatten(2).type_as(q_BSHE)))

    @staticmethod
    def _given(q_BSHE: torch.Tensor, k_BSHE: torch.Tensor, v_BSHE: torch.Tensor, segments: Rows) -> torch.Tensor:
        """What text and control images see (B, P, H, E)."""
        from diffusers.models.attention_dispatch import dispatch_attention_fn

        # No text token looks ahead, so none sees the padding behind its text. The rows of control images are computed
        # in vain here: without them the kernels would need a mask, since they let rows and columns begin together.
        given = (rows_BSHE[:, : segments.given_tokens] for rows_BSHE in (q_BSHE, k_BSHE, v_BSHE))
        text_BPHE = dispatch_attention_fn(*given, is_causal=True)
        parts, end = [], 0
        for control in segments.controls:
            start, tokens, _ = control.shape
            parts.append(text_BPHE[:, end:start])
            end = start + tokens
            parts.append(dispatch_attention_fn(q_BSHE[:, start:end], k_BSHE[:, :end], v_BSHE[:, :end]))
        return torch.cat([*parts, text_BPHE[:, end:]], dim=1) if parts else text_BPHE


def turned(rows_BSHE: torch.Tensor, rope_BSE: torch.Tensor) -> torch.Tensor:
    """Queries or keys at their places."""
    pairs = torch.view_as_complex(rows_BSHE.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rope_BSE.unsqueeze(2)).flatten(3).type_as(rows_BSHE)


class Entry(nn.Module):
    """Embeds text, pictures and time, and makes the modulation of all blocks."""

    def __init__(self, denoiser: QwenImage21Transformer2DModel):
        super().__init__()
        self.img_in, self.txt_in = denoiser.img_in, denoiser.txt_in
        self.time_text_embed, self.modulation = denoiser.time_text_embed, denoiser.modulation
        self.causal_condition = denoiser.config.causal_condition

    def forward(self, inputs: QwenImage21Inputs) -> QwenImage21Stream:
        dtype = self.img_in.weight.dtype
        pictures = [rearrange(one, "b c 1 h w -> b (h w) c") for one in (*inputs.controls, inputs.x_BCfhw)]
        counts = [picture.shape[1] for picture in pictures]
        *given, x_BTD = self.img_in(torch.cat(pictures, dim=1).to(dtype)).split(counts, dim=1)
        text_BLD = self.txt_in(inputs.text_BLD.to(dtype))
        parts, controls, read, end = [], [], 0, 0
        for control_BTD, place in zip(given, inputs.places, strict=True):
            start, tokens = end + len(place) - read, control_BTD.shape[1]
            parts += [text_BLD[:, read : len(place)], control_BTD]
            controls.append(x_BTD.new_empty(start, tokens, 0))
            read, end = len(place), start + tokens
        # The time stays float32 until it is embedded.
        t_R = torch.cat([inputs.t_B, inputs.t_B.new_zeros(1)]) if self.causal_condition else inputs.t_B
        time_RD = self.time_text_embed(t_R, x_BTD)
        return QwenImage21Stream(
            x_BSD=torch.cat([*parts, text_BLD[:, read:], x_BTD], dim=1),
            controls=tuple(controls),
            lengths=inputs.lengths,
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
        length, x_BSD = stream.given_tokens, stream.x_BSD
        noisy_S = torch.arange(x_BSD.shape[1], device=x_BSD.device) >= length if self.causal_condition else None
        x_BSD = self.block(
            hidden_states=x_BSD,
            modulation=stream.modulation_RD,
            rotary_emb=stream.rope_BSE,
            target_token_mask=noisy_S,
            segments=Rows(length, stream.controls, stream.lengths),
        )
        return stream._replace(x_BSD=x_BSD)


class Exit(nn.Module):
    """Projects the tokens of the noisy picture to the latent (B, C, 1, h, w)."""

    def __init__(self, denoiser: QwenImage21Transformer2DModel):
        super().__init__()
        self.norm_out, self.proj_out = denoiser.norm_out, denoiser.proj_out

    def forward(self, stream: QwenImage21Stream) -> torch.Tensor:
        x_BTD = stream.x_BSD[:, stream.given_tokens :]
        x_BTC = self.proj_out(self.norm_out(x_BTD, stream.time_RD[: len(x_BTD)]))
        return rearrange(x_BTC, "b (h w) c -> b c 1 h w", h=stream.canvas_hw0.shape[0])


class QwenImage21Pipeline(BasePipeline):
    """Qwen-Image 2.1 of Alibaba, from text, and from up to ten control images, which the text encoder sees too, before
    the caption, as `<image1>`, `<image2>` and so on. Latents hold the opacity of a picture. Control images are encoded
    at the size that the dataset gives them (inference scales each to the area of 1024 x 1024: `control_resolution =
    1024`)."""

    Options = QwenImage21Options
    denoiser_class = "QwenImage21Transformer2DModel"
    config_keys = ("axes_dims_rope", "context_in_dim", "in_channels", "patch_size")
    text_parts = (TextPart(TEXT, "Qwen3VLModel", tokenizer="processor"),)
    media = MediaFacts(spatial=32)
    blocks = ("transformer_blocks",)
    stream_type = QwenImage21Stream
    original_layout = QWEN_21_LAYOUT
    guided_by_second_prediction = True
    max_controls = len(CONTROLS)

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

    def problems_of_data(self, samples: Sequence[Sample]) -> list[Problem]:
        sizes = {
            (control.bucket.width, control.bucket.height): sample for sample in samples for control in sample.controls
        }
        for size, sample in sizes.items():
            if told := self._told_of_size(*size):
                message = f"a control image of {sample.media.locator} {told}; set another control_resolution"
                return [Problem("", "[[directory]]", message)]
        return []

    def problems_of_samples(self, sampling: SamplingSettings) -> Iterator[Problem]:
        size = sampling.width, sampling.height
        # Of others it is told that no picture can be drawn.
        can_be_drawn = not any(side % self.media.spatial for side in size)
        if sampling.control_images and can_be_drawn and (told := self._told_of_size(*size)):
            yield Problem("", "[sampling] control_images", f"a control image {told}; set another width and height")

    def _told_of_size(self, width: int, height: int) -> str | None:
        """What to tell of a control image of this size in pixels that the text encoder sees at another one, so that it
        would not have a token for every four of the denoiser's; None if it does not."""
        seen = self._text_encoder(1).seen(width, height)
        if seen == (width, height):
            return None
        return f"has {width} x {height} pixels, and Qwen3-VL would see it at {seen[0]} x {seen[1]}"

    def encoders_for(self, controls: int) -> list[Encoder]:
        made = super().encoders_for(controls)
        if controls:
            # Only now it is known that the text encoder has to see pictures.
            self._text_encoder(controls).check()
        return made

    def encoders(self, controls: int = 0) -> list[ModelEncoder]:
        vae = self.options.diffusers_path, self.options.vae_path, self.dtype
        return [
            QwenImage21Autoencoder(*vae, draw=self.options.latents),
            self._text_encoder(controls),
            *(QwenImage21Autoencoder(*vae, reads=name, draw="mode") for name in CONTROLS[:controls]),
        ]

    def _text_encoder(self, controls: int) -> TextEncoder:
        """The text encoder for captions, or for captions together with this many control images."""
        features = Caption(TEXT, self.options.max_sequence_length)
        if not controls:
            return self.parts.text_encoder(features)
        return self.parts.text_encoder(features, ControlledCaptionEncoder, controls=controls)

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
        controls = [features[name].float() for name in LATENTS if name in features]
        # The same for all samples: what differs is the caption behind the control images.
        places = features[f"{TEXT}_places"][0].tolist() if controls else []
        sizes = [picture.shape[3:] for picture in (*controls, x_t)]
        text = text_BLD.shape[1]
        shown = sum(height * width for height, width in sizes[:-1])
        lengths = features[f"{TEXT}_mask"].bool().sum(dim=1).tolist()
        is_padded = min(lengths) < text
        ropes = {own: self._angles(own, text - own, places, sizes) for own in lengths}
        return QwenImage21Inputs(
            x_BCfhw=x_t,
            controls=tuple(controls),
            places=tuple(torch.empty(place, 0) for place in places),
            text_BLD=text_BLD,
            lengths=tuple(torch.empty(own + shown, 0) for own in lengths) if is_padded else None,
            t_B=t_B,
            rope_BSE=torch.stack([ropes[own] for own in (lengths if is_padded else lengths[:1])]),
        )

    def _angles(self, own: int, padding: int, places: Sequence[int], sizes: Sequence[Sequence[int]]) -> torch.Tensor:
        """The angles (S, E) of a text of `own` tokens with control images at `places` in it, of so many tokens that pad
        it, and of the picture behind it.

        Args:
            sizes: height and width of the latents, the noisy one last.
        """
        is_picture = [False] * own
        for place, (height, width) in reversed([*zip([*places, own], sizes, strict=True)]):
            is_picture[place:place] = [True] * (height * width)
        shapes = [(1, height, width) for height, width in sizes]
        angles_SE = self._rope(shapes, torch.tensor(is_picture), torch.device("cpu"))
        height, width = sizes[-1]
        given_SE, picture_SE = angles_SE.split([len(angles_SE) - height * width, height * width])
        return torch.cat([given_SE, angles_SE[:1].expand(padding, -1), picture_SE])

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
