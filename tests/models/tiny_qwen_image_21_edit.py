"""The tiny Qwen-Image 2.1 with control images."""

from __future__ import annotations

import math

import torch
from PIL import Image

from tests.models import tiny_qwen_image_21
from tests.models.tiny_hunyuan_video_i2v import PICTURE
from utils.diffusion.seeds import normal
from utils.media.decode import load_rgba
from utils.media.geometry import View
from utils.settings.run_tables import SamplingSettings

STOCK, CUT = tiny_qwen_image_21.STOCK, tiny_qwen_image_21.CUT
ROUNDED_OTHERWISE = True
"""What is around control images is attended to in one piece, besides."""
write_folder, pipeline, whole = tiny_qwen_image_21.write_folder, tiny_qwen_image_21.pipeline, tiny_qwen_image_21.whole
SIZES = tiny_qwen_image_21.SIZES
SAMPLING = {**tiny_qwen_image_21.SAMPLING, "control_images": [[str(PICTURE)] * 2]}


def features(lengths: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Random text features, with two pictures in the text."""
    places = torch.tensor([2, 4]).repeat(len(lengths), 1)
    return {**tiny_qwen_image_21.features(lengths), "qwen3_vl_places": places}


def features_of_pictures(latent_shape: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Two control images for each picture of a batch, in sizes of their own."""
    channels, frames, height, width = latent_shape
    sizes = {"control_latents": (height, width), "control_2_latents": (height + 2, width)}
    return {name: normal((2, channels, frames, *size), 0, name) for name, size in sizes.items()}


def draw(stock: tiny_qwen_image_21.StockPipeline, sampling: SamplingSettings, noise: torch.Tensor) -> torch.Tensor:
    """With the picture as it is cropped for the sample, at the area of the sample."""
    view = View(sampling.width, sampling.height, "center")
    levels_HWC = ((load_rgba(PICTURE, view)[:, 0] + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0)
    picture = Image.fromarray(levels_HWC.numpy())
    side = math.sqrt(sampling.width * sampling.height)
    return tiny_qwen_image_21.draw(stock, sampling, noise, image=[picture, picture], output_resolution=side)
