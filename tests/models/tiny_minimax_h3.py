"""A whole tiny MiniMax-H3 in diffusers' layout, with random weights, but for what makes sound of latents. Its stock
pipeline is put together of blocks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from diffusers import (
    AutoencoderKLMiniMaxH3,
    MiniMaxH3Blocks,
    MiniMaxH3ModularPipeline,
    MiniMaxH3Scheduler,
    MiniMaxH3Transformer3DModel,
)
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.models.transformers.transformer_minimax_h3 import MiniMaxH3AttnProcessor
from diffusers.modular_pipelines.minimax_h3 import before_denoise
from diffusers.modular_pipelines.minimax_h3.encoders import get_qwen3vl_prompt_embeds
from diffusers.modular_pipelines.minimax_h3.references import MiniMaxH3ImageReference, MiniMaxH3VideoReference
from einops import rearrange
from torch import nn
from transformers import Qwen2Tokenizer, Qwen3VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from models.foundation.encoders.minimax_h3_text import LAYER
from models.foundation.layers.parts_attention import PartsAttention, Places
from models.minimax_h3 import MiniMaxH3Options, MiniMaxH3Pipeline
from tests.models import tiny_qwen_image, tiny_qwen_image_21
from tests.models.tiny_folder import of_true_length, ragged, randomised
from utils.settings.schema import SamplingSettings

SIZES = [(48, 32, 8), (32, 48, 13)]
"""Clips; the stock VAE decodes no picture."""
SAMPLING = {"width": 48, "height": 32, "frames": 8, "guidance": 1.0}
TEXT_TOKENS, TEXT_WIDTH, CHANNELS, SOUND = 64, tiny_qwen_image_21.TEXT_WIDTH, 4, 32
TRANSFORMER = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "hidden_size": 24,
    "num_layers": 2,
    "num_refiner_layers": 2,
    "ffn_dim": 32,
    "in_channels": CHANNELS,
    "audio_in_channels": SOUND,
    "text_dim": TEXT_WIDTH,
    "freq_dim": 8,
    "time_embed_hidden_dim": 24,
    "time_embed_dim": 16,
    "rope_freq_dim": 2,
}
VAE = {
    "latent_channels": CHANNELS,
    "block_out_channels": (8, 8),
    "layers_per_block": 1,
    "spatial_downsample_factors": (2, 2),
    "temporal_downsample_factors": (1, 2),
    "norm_num_groups": 4,
    "decoder_num_layers": 1,
    "decoder_num_attention_heads": 2,
    "decoder_attention_head_dim": 8,
    "decoder_num_register_tokens": 1,
    "decoder_ffn_mult": 1,
    "clip_length": 5,
    "token_drop": 1,
    "latents_mean": (0.1, -0.2, 0.3, 0.0),
    "latents_std": (1.5, 0.7, 1.0, 2.0),
}
"""5 n + 3 frames are 3 n + 2 latent frames."""


class Processor:
    """What the stock pipeline asks of its processor, which needs torchvision.

    Args:
        picture, clip: the numbers of the tokens of a picture and of a clip.
    """

    def __init__(self, folder: Path, picture: int, clip: int):
        self.image_processor = Qwen2VLImageProcessorPil.from_pretrained(folder)
        self.kinds = {picture: 1, clip: 2}

    def create_mm_token_type_ids(self, rows: list[list[int]]) -> list[list[int]]:
        return [[self.kinds.get(token, 0) for token in row] for row in rows]


class PixelVae(AutoencoderKLMiniMaxH3):
    """The stock VAE with pixels in [-1, 1], of which the stock pipeline itself makes those that it takes."""

    def encode(self, x: torch.Tensor, return_dict: bool = True) -> Any:
        mean, std = self._units()
        return super().encode(((x + 1) / 2 - mean) / std, return_dict)

    def decode(self, z: torch.Tensor, return_dict: bool = True) -> DecoderOutput:
        mean, std = self._units()
        return DecoderOutput(sample=(super().decode(z).sample * std + mean) * 2 - 1)

    @staticmethod
    def _units() -> tuple[torch.Tensor, torch.Tensor]:
        known = MiniMaxH3ModularPipeline.pixel_mean.fget(None), MiniMaxH3ModularPipeline.pixel_std.fget(None)
        mean, std = (torch.tensor(one).view(-1, 1, 1, 1) for one in known)
        return mean, std


class StockPipeline(MiniMaxH3ModularPipeline):
    """Without what makes sound and pixels, and for clips of any length."""

    min_duration = 0.0

    @classmethod
    def from_pretrained(cls, folder: Path) -> StockPipeline:
        blocks = MiniMaxH3Blocks()
        blocks.sub_blocks.pop("decode")
        made = cls(blocks=blocks)
        scheduler = MiniMaxH3Scheduler.from_pretrained(folder / "scheduler")
        text_encoder = Qwen3VLForConditionalGeneration.from_pretrained(folder / "text_encoder")
        transformers = {
            place.name: MiniMaxH3Transformer3DModel.from_pretrained(place) for place in folder.glob("transformer*")
        }
        made.update_components(
            text_encoder=text_encoder,
            tokenizer=Qwen2Tokenizer.from_pretrained(folder / "tokenizer"),
            processor=Processor(
                folder / "processor", text_encoder.config.image_token_id, text_encoder.config.video_token_id
            ),
            **transformers,
            vae=PixelVae.from_pretrained(folder / "vae"),
            scheduler=scheduler,
            audio_scheduler=MiniMaxH3Scheduler(shift=3.0),
        )
        return made


STOCK = StockPipeline


def write_folder(folder: Path, *, layers: int = LAYER + 2, vae: dict[str, Any] | None = None, **changes: Any) -> Path:
    """`layers` are the text encoder's, `vae` are changes of the VAE, `changes` the transformer's."""
    torch.manual_seed(0)
    tiny_qwen_image.tokenizer().save_pretrained(folder / "tokenizer")
    Qwen2VLImageProcessorPil(patch_size=16, min_pixels=1024, max_pixels=2**20).save_pretrained(folder / "processor")
    randomised(AutoencoderKLMiniMaxH3(**{**VAE, **(vae or {})}), 2).save_pretrained(folder / "vae")
    transformer = MiniMaxH3Transformer3DModel(**{**TRANSFORMER, **changes})
    randomised(transformer, 1).save_pretrained(folder / "transformer")
    tiny_qwen_image_21.text_encoder(layers).save_pretrained(folder / "text_encoder")
    MiniMaxH3Scheduler(shift=5.0).save_pretrained(folder / "scheduler")
    index = {"_class_name": MiniMaxH3ModularPipeline.__name__, "_blocks_class_name": MiniMaxH3Blocks.__name__}
    (folder / "modular_model_index.json").write_text(json.dumps(index))
    return folder


def pipeline(folder: Path, **options: Any) -> MiniMaxH3Pipeline:
    options = {"dtype": "float32", "max_sequence_length": TEXT_TOKENS, **options}
    return MiniMaxH3Pipeline(MiniMaxH3Options(type="minimax_h3", diffusers_path=folder, **options), seed=0)


def features(lengths: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Random text features of these many tokens each."""
    return ragged("qwen3_vl", lengths, TEXT_WIDTH)


class WithinParts:
    """Our attention in the stock module, which cannot be told of parts."""

    def __init__(self, parts: Sequence[int]):
        self.parts = tuple(torch.empty(length, 0) for length in parts)
        self.attention = PartsAttention(MiniMaxH3AttnProcessor())

    def __call__(
        self, attn: nn.Module, x_1PD: torch.Tensor, rope: tuple[torch.Tensor, ...] | None, mask: None
    ) -> torch.Tensor:
        return self.attention(attn, x_1PD, Places(rope, self.parts))


def whole(
    denoiser: MiniMaxH3Transformer3DModel,
    pipeline: MiniMaxH3Pipeline,
    features: dict,
    x_t: torch.Tensor,
    t_B: torch.Tensor,
) -> torch.Tensor:
    """All samples in one sequence, with our attention, as the stock one would see all of it: its pipeline has one
    sample alone, which tests/models/test_minimax_h3.py compares with. Key frames, or references, are before the clip of
    each sample."""
    keys = features.get("key_frame_latents", x_t[:, :, :0])
    references = [latents for name, latents in features.items() if name.startswith("control")]
    mask_BL, count = features["qwen3_vl_mask"], keys.shape[2] + len(references)
    kinds_BL = features.get("qwen3_vl_kinds", torch.ones_like(mask_BL, dtype=torch.long))
    ids, tags, of_text, of_video, of_clip, times, parts, rows = ([] for _ in range(8))
    for number, (kind_L, mask_L) in enumerate(zip(kinds_BL, mask_BL, strict=True)):
        anchors = ("first", "last")[: keys.shape[2]]
        ids_S3, tags_S, videos, _, lines, given, _ = layout(kind_L[mask_L], x_t, anchors, references)
        start, time_S = sum(parts), torch.full((len(tags_S),), number * (1 + bool(count)))
        time_S[videos[:given]] += 1
        ids, tags, times, parts = [*ids, ids_S3], [*tags, tags_S], [*times, time_S], [*parts, len(tags_S)]
        of_text, of_video = [*of_text, lines + start], [*of_video, videos + start]
        of_clip.append(torch.arange(len(videos))[given:] + number * len(videos))
        own = [one[number, None] for one in (keys, *references, x_t)]
        rows += [before_denoise.patchify_video_latents(one, (1, 2, 2)) for one in own]
    texts = mask_BL.sum(dim=1).tolist()
    for name, module in denoiser.named_modules():
        if hasattr(module, "set_processor"):
            module.set_processor(WithinParts(texts if name.startswith("token_refiner.") else parts))
    told = torch.stack([1 - t_B, (1 - t_B).clamp(min=0.999)], dim=1) if count else 1 - t_B
    output_1VN, _ = denoiser(
        hidden_states=torch.cat(rows)[None],
        audio_hidden_states=torch.empty(1, 0, SOUND),
        encoder_hidden_states=features["qwen3_vl"][mask_BL][None],
        timestep=told.flatten(),
        timestep_indices=torch.cat(times),
        token_tags=torch.cat(tags),
        position_ids=torch.cat(ids),
        video_indices=torch.cat(of_video),
        audio_indices=torch.empty(0, dtype=torch.long),
        text_indices=torch.cat(of_text),
        return_dict=False,
    )
    _, _, frames, height, width = x_t.shape
    return rearrange(
        output_1VN[:, torch.cat(of_clip)],
        "1 (b f h w) (c p q) -> b c f (h p) (w q)",
        **dict(zip("fhwpq", (frames, height // 2, width // 2, 2, 2), strict=True)),
    )


def layout(
    kind_L: torch.Tensor, x_t: torch.Tensor, anchors: tuple[str, ...] = (), references: Sequence[torch.Tensor] = ()
) -> tuple[Any, ...]:
    """How the stock pipeline lays out a text of such tokens, key frames or references, and a clip, without sound."""
    how = *x_t.shape[2:], 0, (1, 2, 2), 2, 2, 0
    if references:
        build = before_denoise.MiniMaxH3Ref2VAPrepareLayoutStep.build_ref2va_packed_sequence
        given = [
            MiniMaxH3VideoReference(None) if one.shape[2] > 1 else MiniMaxH3ImageReference(None) for one in references
        ]
        return build(kind_L, given, references, [], *how)
    return before_denoise.MiniMaxH3PrepareLayoutStep.build_packed_sequence(kind_L, *how, anchors)


def prompt_features(stock: StockPipeline, captions: list[str]) -> list[dict[str, torch.Tensor]]:
    """Of a caption without tokens the stock pipeline makes an error."""
    rows = [stock.tokenizer(caption, add_special_tokens=False).input_ids[:TEXT_TOKENS] for caption in captions]
    texts = [
        get_qwen3vl_prompt_embeds(stock.text_encoder, stock.processor, row, text_encoder_layer=LAYER)[0]
        if row
        else torch.empty(0, TEXT_WIDTH)
        for row in rows
    ]
    return of_true_length("qwen3_vl", texts, [len(row) for row in rows])


def stock_latents(stock: StockPipeline, pixels_BCFHW: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(VAE[f"latents_{name}"]).view(-1, 1, 1, 1) for name in ("mean", "std"))
    return (stock.vae.encode(pixels_BCFHW).latent_dist.mode() - mean) / std


def draw(stock: StockPipeline, sampling: SamplingSettings, noise: torch.Tensor, **keys: Any) -> torch.Tensor:
    """Without sound."""
    with mock.patch.object(before_denoise, "audio_latent_num_frames", lambda frames: 0):
        return stock(
            prompt=sampling.prompts[0],
            width=sampling.width,
            height=sampling.height,
            num_frames=sampling.frames,
            num_inference_steps=sampling.steps,
            latents=noise,
            output="latents",
            **keys,
        )
