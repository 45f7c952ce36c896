"""A whole tiny Wan VACE in diffusers' layout: as the tiny Wan, with blocks that read a clip to follow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanVACEPipeline, WanVACETransformer3DModel
from torch.nn import functional
from transformers import PreTrainedTokenizerFast, UMT5EncoderModel

from models.wan_vace import WanVaceOptions, WanVacePipeline
from tests.models import tiny_wan, tiny_wan_i2v
from tests.models.tiny_folder import drawn, randomised, write_index
from tests.models.tiny_wan import CHANNELS, TEXT_TOKENS
from utils.diffusion.seeds import normal
from utils.media.decode import load_image
from utils.media.geometry import View
from utils.media.writing import tensor_to_image
from utils.settings.run_tables import SamplingSettings


class StockPipeline(WanVACEPipeline):
    """Its own `prompt_clean` fails where ftfy is not installed; that of text to video does not."""

    _get_t5_prompt_embeds = tiny_wan.STOCK._get_t5_prompt_embeds


STOCK, SIZES = StockPipeline, tiny_wan.SIZES
PICTURE = tiny_wan_i2v.PICTURE
SAMPLING = {**tiny_wan.SAMPLING, "control_images": [str(PICTURE)]}
CELL = 8
TRANSFORMER = {**tiny_wan.TRANSFORMER, "vace_layers": [0, 2], "vace_in_channels": 2 * CHANNELS + CELL**2}
# All blocks read text and time, and gradients are summed in the order of the blocks, which is another here.
SUMMED_OTHERWISE = ("condition_embedder.",)


def write_folder(folder: Path, **changes: Any) -> Path:
    """`changes` are the transformer's."""
    tiny_wan.write_folder(folder)
    torch.manual_seed(0)
    made = randomised(WanVACETransformer3DModel(**{**TRANSFORMER, **changes}), 1)
    made.save_pretrained(folder / "transformer")
    parts = {
        "tokenizer": PreTrainedTokenizerFast,
        "text_encoder": UMT5EncoderModel,
        "transformer": WanVACETransformer3DModel,
        "transformer_2": None,
        "vae": AutoencoderKLWan,
        "scheduler": UniPCMultistepScheduler,
    }
    write_index(folder, WanVACEPipeline, parts)
    return folder


def pipeline(folder: Path, **options: Any) -> WanVacePipeline:
    options = {"dtype": "float32", "max_sequence_length": TEXT_TOKENS, **options}
    return WanVacePipeline(WanVaceOptions(type="wan_vace", diffusers_path=folder, **options), seed=0)


def dataset_of(pictures: Path) -> dict[str, Any]:
    return {"directory": [{"path": str(pictures), "control_path": str(pictures)}]}


features = tiny_wan.features


def features_of_pictures(latent_shape: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Random features of what a batch follows."""
    return {"guide_latents": normal((2, 2 * CHANNELS, *latent_shape[1:]), 0, "guide")}


def whole(
    denoiser: WanVACETransformer3DModel, pipeline: WanVacePipeline, features: dict, x_t: torch.Tensor, t_B: torch.Tensor
) -> torch.Tensor:
    missing = TEXT_TOKENS - features["umt5"].shape[1]
    mask = torch.ones(len(x_t), CELL**2, *x_t.shape[2:])
    return denoiser(
        x_t,
        t_B * 1000,
        functional.pad(features["umt5"], (0, 0, 0, missing)),
        control_hidden_states=torch.cat([features["guide_latents"], mask], dim=1),
        return_dict=False,
    )[0]


prompt_features, stock_latents = tiny_wan.prompt_features, tiny_wan.stock_latents


def draw(stock: StockPipeline, sampling: SamplingSettings, noise: torch.Tensor) -> torch.Tensor:
    """A still is followed for all of the clip."""
    picture = tensor_to_image(load_image(PICTURE, View(sampling.width, sampling.height, "center")))
    keys = {"num_frames": sampling.frames, "max_sequence_length": TEXT_TOKENS, "video": [picture] * sampling.frames}
    return drawn(stock, sampling, noise, **keys).frames
