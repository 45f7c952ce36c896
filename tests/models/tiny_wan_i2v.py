"""A whole tiny Wan 2.1 of picture to video in diffusers' layout; `tiny_wan_i2v_blind` is that of 2.2, without CLIP, and
`tiny_wan_flf` that of a first and a last frame."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanImageToVideoPipeline, WanTransformer3DModel
from torch.nn import functional
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    PreTrainedTokenizerFast,
    UMT5EncoderModel,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from models.wan import WanOptions, WanPipeline
from tests.models import tiny_wan
from tests.models.tiny_flux import MINI_FLUX
from tests.models.tiny_folder import drawn, of_true_length, randomised, write_index
from utils.diffusion.seeds import normal
from utils.media.decode import load_image
from utils.media.geometry import View
from utils.media.writing import tensor_to_image
from utils.settings.run_tables import SamplingSettings


class StockPipeline(WanImageToVideoPipeline):
    """Its own `prompt_clean` fails where ftfy is not installed; that of text to video does not."""

    _get_t5_prompt_embeds = tiny_wan.STOCK._get_t5_prompt_embeds


STOCK = StockPipeline
SIZES = [(48, 32, 9), (32, 64, 5)]
PICTURE = MINI_FLUX.parents[1] / "docs" / "quickstart.png"
SAMPLING = {**tiny_wan.SAMPLING, "control_images": [str(PICTURE)]}
SEEN = {"image_dim": 16, "added_kv_proj_dim": 24}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
VISION_TOKENS = 5
TEXT_TOKENS = 512
CHANNELS = 2 * tiny_wan.CHANNELS + 4


def write_folder(folder: Path, *, seen: bool = True, **changes: Any) -> Path:
    """`changes` are the transformer's."""
    tiny_wan.write_folder(folder, in_channels=CHANNELS, **(SEEN if seen else {}), **changes)
    parts = {
        "tokenizer": PreTrainedTokenizerFast,
        "text_encoder": UMT5EncoderModel,
        "transformer": WanTransformer3DModel,
        "transformer_2": None,
        "vae": AutoencoderKLWan,
        "scheduler": UniPCMultistepScheduler,
        "image_encoder": CLIPVisionModel if seen else None,
        "image_processor": CLIPImageProcessorPil if seen else None,
    }
    if seen:
        torch.manual_seed(1)
        randomised(CLIPVisionModel(CLIPVisionConfig(**VISION)), 4).save_pretrained(folder / "image_encoder")
        sizes = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
        CLIPImageProcessorPil(**sizes).save_pretrained(folder / "image_processor")
    write_index(folder, WanImageToVideoPipeline, parts)
    return folder


def pipeline(folder: Path, **options: Any) -> WanPipeline:
    return WanPipeline(WanOptions(type="wan", dtype="float32", diffusers_path=folder, **options), seed=0)


features = tiny_wan.features


def features_of_pictures(latent_shape: tuple[int, ...], batch: int = 2) -> dict[str, torch.Tensor]:
    """Random features of the first frames of a batch."""
    return {
        "first_frame_latents": normal((batch, *latent_shape), 0, "first frame"),
        "clip_vision": normal((batch, VISION_TOKENS, VISION["hidden_size"]), 0, "clip"),
    }


def whole(
    denoiser: WanTransformer3DModel, pipeline: WanPipeline, features: dict, x_t: torch.Tensor, t_B: torch.Tensor
) -> torch.Tensor:
    missing = TEXT_TOKENS - features["umt5"].shape[1]
    mask = torch.zeros(len(x_t), 4, *x_t.shape[2:])
    mask[:, :, 0] = 1
    return denoiser(
        torch.cat([x_t, mask, features["first_frame_latents"]], dim=1),
        t_B * 1000,
        functional.pad(features["umt5"], (0, 0, 0, missing)),
        features.get("clip_vision"),
        return_dict=False,
    )[0]


def prompt_features(stock: StockPipeline, captions: list[str]) -> list[dict[str, torch.Tensor]]:
    text_BLD, _ = stock.encode_prompt(captions, None, False, max_sequence_length=TEXT_TOKENS, device="cpu")
    lengths = [len(stock.tokenizer(caption).input_ids) for caption in captions]
    return of_true_length("umt5", text_BLD, lengths)


stock_latents = tiny_wan.stock_latents


def draw(stock: StockPipeline, sampling: SamplingSettings, noise: torch.Tensor) -> torch.Tensor:
    picture = tensor_to_image(load_image(PICTURE, View(sampling.width, sampling.height, "center")))
    keys = {"image": picture, "num_frames": sampling.frames, "max_sequence_length": TEXT_TOKENS}
    return drawn(stock, sampling, noise, **keys).frames
