"""A tiny MiniMax-H3 that is trained on clips from their first frame to their last."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import torch
from diffusers import AutoencoderKLMiniMaxH3
from diffusers.modular_pipelines.minimax_h3 import before_denoise

from models.foundation.encoders.vae import picture_noise
from models.minimax_h3 import MiniMaxH3Pipeline
from tests.models import tiny_minimax_h3
from tests.models.tiny_hunyuan_video_i2v import PICTURE
from utils.diffusion.seeds import normal
from utils.media.decode import load_image
from utils.media.geometry import View
from utils.media.writing import tensor_to_image
from utils.settings.schema import SamplingSettings

STOCK, SIZES = tiny_minimax_h3.STOCK, tiny_minimax_h3.SIZES
SAMPLING = {**tiny_minimax_h3.SAMPLING, "control_images": [[str(PICTURE)] * 2]}
"""A clip of a picture to itself; tests/models/test_minimax_h3.py tells first and last frames apart."""
write_folder, whole = tiny_minimax_h3.write_folder, tiny_minimax_h3.whole


def pipeline(folder: Path, **options: Any) -> MiniMaxH3Pipeline:
    return tiny_minimax_h3.pipeline(folder, **{"to_last_frame": True, **options})


def features(lengths: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Random text features, of which every other token is one of a picture."""
    made = tiny_minimax_h3.features(lengths)
    return {**made, "qwen3_vl_kinds": torch.arange(made["qwen3_vl"].shape[1]).remainder(2).repeat(len(lengths), 1)}


def features_of_pictures(latent_shape: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Random features of the first and last frames of a batch."""
    channels, _, *size = latent_shape
    return {"key_frame_latents": normal((2, channels, 2, *size), 0, "key frames")}


def draw(stock: Any, sampling: SamplingSettings, noise: torch.Tensor) -> torch.Tensor:
    """With our noise on the key frames; of sound there is none."""
    # The pipeline itself brings pixels into the units of the VAE.
    stock.vae.__class__ = AutoencoderKLMiniMaxH3
    pixels_C1HW = load_image(PICTURE, View(sampling.width, sampling.height, "center"))
    on_picture, picture = picture_noise(pixels_C1HW[None], noise[:, :, :1]), tensor_to_image(pixels_C1HW)

    def given(shape: tuple[int, ...], **how: Any) -> torch.Tensor:
        return on_picture if on_picture.shape == shape else torch.zeros(shape)

    with mock.patch.object(before_denoise, "randn_tensor", given):
        return tiny_minimax_h3.draw(stock, sampling, noise, image=picture, last_image=picture)
