"""HunyuanVideo 1.5: blocks with two streams, text to video and picture to video.

Both have the latent of a first frame and its mask as further channels, which are zeros in text to video. Picture to
video sees the first frame through SigLIP too, as tokens of the text.

Shapes: B batch, C latent channels, f h w latent frames, height and width, T video tokens, L text tokens, first those of
the picture, then those of quoted texts, D width of the transformer.
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
from models.families.clips import SeesFrames, problems_of_image_encoder, problems_of_stills
from models.foundation.checkpoints.configs import stock_scheduler
from models.foundation.checkpoints.folders import TextPart, model_index
from models.foundation.checkpoints.layouts.hunyuan_video_15 import HUNYUAN_VIDEO_15_LAYOUT
from models.foundation.checkpoints.weights import CheckpointNames
from models.foundation.encoders.first_frame import SiglipVision
from models.foundation.encoders.hunyuan_prompts import VideoGlyphFeatures, assisted_prompt
from models.foundation.encoders.hunyuan_vae import (
    HUNYUAN_VIDEO_15,
    HunyuanVideo15Autoencoder,
    HunyuanVideo15FirstFrame,
    hunyuan_latent_size,
)
from models.foundation.encoders.text import TextEncoder
from models.foundation.layers.chain import Middle
from models.foundation.layers.given import beside_first_frame
from models.foundation.layers.padding import mask_behind, seen_first
from models.foundation.layers.patches import blank_latent
from utils.dataset.buckets import MediaFacts
from utils.dataset.samples import Sample
from utils.diffusion.objectives import FlowMatching
from utils.errors import Problem, UserError
from utils.settings.values import Count

if TYPE_CHECKING:
    from diffusers import FlowMatchEulerDiscreteScheduler, HunyuanVideo15Transformer3DModel

TEXT, GLYPHS, PICTURE = "qwen2_5_vl", "byt5", SiglipVision.name
GLYPH_TOKENS = 256
OF_TEXT, OF_GLYPHS, OF_PICTURE = range(3)
"""What kind of token it is, as the model is told."""
FROM_PICTURE = "HunyuanVideo15ImageToVideoPipeline"


class HunyuanVideo15Options(SeesFrames):
    """`[model]` of `type = "hunyuan_video_15"`."""

    max_sequence_length: Count = 1000
    """Number of Qwen2.5-VL tokens of a caption that are read."""


class HunyuanVideo15Inputs(NamedTuple):
    """The inputs of the entry; `x_BCfhw` has the channels of the first frame and its mask too. Without a mask, no text
    is padded. `order_BL` has the places, among picture, glyphs and text one after the other, of the tokens in the order
    in which the model sees them."""

    x_BCfhw: torch.Tensor
    text_BLD: torch.Tensor
    text_mask_BL: torch.Tensor | None
    glyphs_BLD: torch.Tensor
    picture_BLD: torch.Tensor | None
    order_BL: torch.Tensor
    all_mask_BL: torch.Tensor | None
    t_B: torch.Tensor


class HunyuanVideo15Stream(NamedTuple):
    """What travels from layer to layer. `canvas_fhw0` has no elements: its shape carries the tokens' grid."""

    x_BTD: torch.Tensor
    text_BLD: torch.Tensor
    mask_BL: torch.Tensor | None
    time_BD: torch.Tensor
    rope_TD: tuple[torch.Tensor, torch.Tensor]
    canvas_fhw0: torch.Tensor


class TextMaskAttention:
    """Calls HunyuanVideo's attention processor with the mask of the text (B, L), or without any.

    The model's own makes a mask of all pairs of tokens, gigabytes for a clip, in which padding sees nothing either.
    What it sees has no effect."""

    def __init__(self, processor: Any):
        self.processor = processor

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        mask = None if attention_mask is None else mask_behind(attention_mask, hidden_states.shape[1])
        return self.processor(attn, hidden_states, encoder_hidden_states, mask, image_rotary_emb)


class Entry(nn.Module):
    """Embeds patches, time and positions, and makes one text of the picture, the quoted texts and the caption. Each
    stage makes the rotary tables itself."""

    remakes = ("rope_TD",)

    def __init__(self, denoiser: HunyuanVideo15Transformer3DModel):
        super().__init__()
        self.rope = denoiser.rope
        self.x_embedder = denoiser.x_embedder
        self.context_embedder = denoiser.context_embedder
        self.context_embedder_2 = denoiser.context_embedder_2
        self.image_embedder = denoiser.image_embedder
        self.cond_type_embed = denoiser.cond_type_embed
        self.time_embed = denoiser.time_embed
        self.patch = (denoiser.config.patch_size_t, denoiser.config.patch_size, denoiser.config.patch_size)

    def forward(self, inputs: HunyuanVideo15Inputs) -> HunyuanVideo15Stream:
        dtype = self.x_embedder.proj.weight.dtype
        x_BCfhw, time = inputs.x_BCfhw.to(dtype), self.time_embed
        grid = [side // patch for side, patch in zip(x_BCfhw.shape[2:], self.patch, strict=True)]
        texts_BLD = [
            self._of_kind(OF_GLYPHS, self.context_embedder_2(inputs.glyphs_BLD.to(dtype))),
            self._of_kind(OF_TEXT, self._refined(inputs.text_BLD.to(dtype), inputs.t_B, inputs.text_mask_BL)),
        ]
        if inputs.picture_BLD is not None:
            texts_BLD.insert(0, self._of_kind(OF_PICTURE, self.image_embedder(inputs.picture_BLD.to(dtype))))
        return HunyuanVideo15Stream(
            x_BTD=self.x_embedder(x_BCfhw),
            text_BLD=torch.take_along_dim(torch.cat(texts_BLD, dim=1), inputs.order_BL.unsqueeze(2), dim=1),
            mask_BL=inputs.all_mask_BL,
            # Its own forward would embed the time in the type in which it is told, which is float32.
            time_BD=time.timestep_embedder(time.time_proj(inputs.t_B).to(dtype)),
            rope_TD=self.rope(x_BCfhw),
            canvas_fhw0=torch.empty(*grid, 0, device=x_BCfhw.device),
        )

    def remake(self, stream: HunyuanVideo15Stream) -> dict[str, Any]:
        """The fields that are not sent from stage to stage."""
        return {"rope_TD": self.rope(blank_latent(stream.canvas_fhw0, self.patch))}

    def _of_kind(self, kind: int, text_BLD: torch.Tensor) -> torch.Tensor:
        kinds_BL = torch.full(text_BLD.shape[:2], kind, device=text_BLD.device)
        return text_BLD + self.cond_type_embed(kinds_BL)

    def _refined(self, text_BLD: torch.Tensor, t_B: torch.Tensor, mask_BL: torch.Tensor | None) -> torch.Tensor:
        """What the refiner makes of the caption. In its own forward padding sees nothing, of which some kernels of
        attention make no number."""
        refiner = self.context_embedder
        if mask_BL is None:
            return refiner(text_BLD, t_B)
        mask_BL1 = mask_BL.float().unsqueeze(-1)
        pooled_BD = ((text_BLD * mask_BL1).sum(dim=1) / mask_BL1.sum(dim=1)).to(text_BLD.dtype)
        time_BD, text_BLD = refiner.time_text_embed(t_B, pooled_BD), refiner.proj_in(text_BLD)
        for block in refiner.token_refiner.refiner_blocks:
            text_BLD = block(text_BLD, time_BD, mask_BL[:, None, None])
        return text_BLD


class Exit(nn.Module):
    """Projects the video tokens to the latent (B, C, f, h, w)."""

    def __init__(self, denoiser: HunyuanVideo15Transformer3DModel):
        super().__init__()
        self.norm_out = denoiser.norm_out
        self.proj_out = denoiser.proj_out
        self.patch = (denoiser.config.patch_size_t, denoiser.config.patch_size, denoiser.config.patch_size)

    def forward(self, stream: HunyuanVideo15Stream) -> torch.Tensor:
        x_BTC = self.proj_out(self.norm_out(stream.x_BTD, stream.time_BD))
        frames, height, width, _ = stream.canvas_fhw0.shape
        return rearrange(
            x_BTC,
            "b (f h w) (c p q r) -> b c (f p) (h q) (w r)",
            **dict(zip("fhwpqr", (frames, height, width, *self.patch), strict=True)),
        ).contiguous()


class HunyuanVideo15Pipeline(BasePipeline):
    """HunyuanVideo 1.5 of Tencent: text to video, and picture to video, which differ in their weights alone and are
    told apart by the class that `model_index.json` names. Texts in double quotation marks are read by ByT5 too."""

    Options = HunyuanVideo15Options
    denoiser_class = "HunyuanVideo15Transformer3DModel"
    config_keys = ("image_embed_dim", "in_channels", "text_embed_2_dim", "text_embed_dim")
    text_parts = (
        # Files of the whole Qwen2.5-VL have its vision too.
        TextPart(TEXT, "Qwen2_5_VLTextModel", names=CheckpointNames("model.language_model.")),
        TextPart(GLYPHS, "T5EncoderModel", "text_encoder_2", "tokenizer_2"),
    )
    media = MediaFacts(spatial=16, temporal=4, max_frames=241, fps=24.0)
    objective = FlowMatching(time_scale=1000.0)
    blocks = ("transformer_blocks",)
    stream_type = HunyuanVideo15Stream
    original_layout = HUNYUAN_VIDEO_15_LAYOUT
    guided_by_second_prediction = True

    @cached_property
    def starts_from_picture(self) -> bool:
        # `check` reports a damaged index. `task_type` of the configuration is i2v in some folders of text to video.
        with suppress(UserError):
            return model_index(self.options.diffusers_path).get("_class_name") == FROM_PICTURE
        return False

    def problems_of_parts(self) -> Iterator[Problem]:
        config, made = self.parts.denoiser_config, self._vae_config["latent_channels"]
        yield from problems_of_image_encoder(self.options, sees=self.starts_from_picture)
        if config.get("use_meanflow"):
            yield self.parts.misfit(
                "is the step-distilled model, which learns steps of its own and is not trained here; give HunyuanVideo "
                "1.5 itself"
            )
        if config["in_channels"] != 2 * made + 1:
            yield self.parts.misfit(
                f"takes {config['in_channels']} channels, and the VAE makes {made}, of which this model takes "
                f"{2 * made + 1}; give HunyuanVideo 1.5, not that for super-resolution, with its own VAE"
            )
        for encoder, key, what in zip(
            self._text_encoders(), ("text_embed_dim", "text_embed_2_dim"), ("Qwen2.5-VL 7B", "Glyph-ByT5"), strict=True
        ):
            _, width = encoder.shapes[encoder.features.name]
            if config[key] != width:
                yield self.parts.misfit(f"has `{key}` {config[key]}, and its text encoder makes {width}; give {what}")
        if self.starts_from_picture:
            width = self._siglip().config["hidden_size"]
            if config["image_embed_dim"] != width:
                yield self.parts.misfit(
                    f"has `image_embed_dim` {config['image_embed_dim']}, and its image encoder makes {width}; give "
                    "SigLIP's of the model itself"
                )

    def problems_of_data(self, samples: Sequence[Sample]) -> list[Problem]:
        return problems_of_stills(samples) if self.starts_from_picture else []

    def _text_encoders(self) -> list[TextEncoder]:
        kinds = (assisted_prompt(TEXT, self.options.max_sequence_length), VideoGlyphFeatures(GLYPHS, GLYPH_TOKENS))
        return [self.parts.text_encoder(features) for features in kinds]

    def _siglip(self) -> SiglipVision:
        return SiglipVision(self.options.diffusers_path, self.options.image_encoder_path, self.dtype)

    def encoders(self, controls: int = 0) -> list[ModelEncoder]:
        options = self.options
        vae = (options.diffusers_path, options.vae_path, self.dtype)
        return [
            HunyuanVideo15Autoencoder(*vae, draw=options.latents),
            *self._text_encoders(),
            *([HunyuanVideo15FirstFrame(*vae), self._siglip()] if self.starts_from_picture else []),
        ]

    def build_denoiser(self) -> HunyuanVideo15Transformer3DModel:
        from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoAttnProcessor2_0

        denoiser = super().build_denoiser()
        for block in denoiser.transformer_blocks:
            block.attn.set_processor(TextMaskAttention(HunyuanVideoAttnProcessor2_0()))
        return denoiser

    def to_layers(self, denoiser: HunyuanVideo15Transformer3DModel) -> list[nn.Module]:
        reads = {
            "hidden_states": "x_BTD",
            "encoder_hidden_states": "text_BLD",
            "temb": "time_BD",
            "attention_mask": "mask_BL",
            "freqs_cis": "rope_TD",
        }
        middles = [Middle(block, reads, writes=("x_BTD", "text_BLD")) for block in denoiser.transformer_blocks]
        return [Entry(denoiser), *middles, Exit(denoiser)]

    def prepare_inputs(
        self, features: Features, x_t: torch.Tensor, t_B: torch.Tensor, guidance: float | None = None
    ) -> HunyuanVideo15Inputs:
        text_mask_BL, glyph_mask_BL = (features[f"{name}_mask"].bool() for name in (TEXT, GLYPHS))
        picture_BLD = features[PICTURE] if self.starts_from_picture else None
        masks_BL = [glyph_mask_BL, text_mask_BL]
        if picture_BLD is not None:
            masks_BL.insert(0, torch.ones(picture_BLD.shape[:2], dtype=torch.bool))
        order_BL, all_mask_BL = seen_first(*masks_BL)
        first = features["first_frame_latents"] if self.starts_from_picture else None
        return HunyuanVideo15Inputs(
            x_BCfhw=beside_first_frame(x_t, first),
            text_BLD=features[TEXT],
            text_mask_BL=None if text_mask_BL.all() else text_mask_BL,
            glyphs_BLD=features[GLYPHS],
            picture_BLD=picture_BLD,
            order_BL=order_BL,
            all_mask_BL=all_mask_BL,
            t_B=self.objective.model_time(t_B),
        )

    def tokens(self, latent_shape: Sequence[int]) -> int:
        *_, height, width = latent_shape
        return height * width

    def latent_shape(self, width: int, height: int, frames: int = 1) -> tuple[int, ...]:
        return hunyuan_latent_size(self._vae_config, width, height, frames)

    def scheduler(self) -> FlowMatchEulerDiscreteScheduler:
        return stock_scheduler(self.options.diffusers_path, "FlowMatchEulerDiscreteScheduler")

    # Kept, as every micro-batch asks for it.
    @cached_property
    def _vae_config(self) -> dict[str, Any]:
        return HUNYUAN_VIDEO_15.config(self.options.diffusers_path, self.options.vae_path)
