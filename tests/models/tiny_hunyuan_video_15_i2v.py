"""A whole tiny HunyuanVideo 1.5 of picture to video in diffusers' layout, with random weights."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import HunyuanVideo15ImageToVideoPipeline as StockPipeline
from transformers import SiglipVisionConfig, SiglipVisionModel
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from tests.models import tiny_hunyuan_video_15
from tests.models.tiny_folder import randomised
from tests.models.tiny_hunyuan_video_15 import CUT, features, pipeline, stock_latents, whole  # noqa: F401
from tests.models.tiny_hunyuan_video_i2v import PICTURE
from utils.diffusion.seeds import normal
from utils.media.decode import load_image
from utils.media.geometry import View
from utils.media.writing import tensor_to_image
from utils.settings.run_tables import SamplingSettings

STOCK = StockPipeline
SIZES = [(64, 32, 5), (32, 48, 9)]
SAMPLING = {**tiny_hunyuan_video_15.SAMPLING, "control_images": [str(PICTURE)]}
SIDE, PICTURE_TOKENS = 16, 9
VISION = {
    "hidden_size": tiny_hunyuan_video_15.PICTURE_WIDTH,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": 5,
}
"""The last pixel belongs to no patch, as in the real one."""


def write_folder(folder: Path) -> Path:
    tiny_hunyuan_video_15.write_folder(folder, STOCK)
    randomised(SiglipVisionModel(SiglipVisionConfig(**VISION)), 5).save_pretrained(folder / "image_encoder")
    SiglipImageProcessorPil(size={"height": SIDE, "width": SIDE}).save_pretrained(folder / "feature_extractor")
    index = json.loads((folder / "model_index.json").read_text())
    index["image_encoder"] = ["transformers", "SiglipVisionModel"]
    index["feature_extractor"] = ["transformers", "SiglipImageProcessorPil"]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def features_of_pictures(latent_shape: tuple[int, ...], batch: int = 2) -> dict[str, torch.Tensor]:
    """Random features of the first frames of a batch."""
    channels, _, *size = latent_shape
    return {
        "first_frame_latents": normal((batch, channels, 1, *size), 0, "first frame"),
        "siglip_vision": normal((batch, PICTURE_TOKENS, VISION["hidden_size"]), 0, "picture"),
    }


def picture_of(width: int, height: int) -> object:
    """The picture at the size of a sample, as the stock pipeline makes it of one of this shape."""
    return tensor_to_image(load_image(PICTURE, View(width, height, "center")))


def draw(stock: StockPipeline, sampling: SamplingSettings, noise: torch.Tensor) -> torch.Tensor:
    picture = picture_of(sampling.width, sampling.height)
    return tiny_hunyuan_video_15.draw(stock, sampling, noise, image=picture)
