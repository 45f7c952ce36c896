"""A tiny MiniMax-H3 that is trained with references."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from diffusers import AutoencoderKLMiniMaxH3
from diffusers.modular_pipelines.minimax_h3 import before_denoise
from diffusers.modular_pipelines.minimax_h3.references import MiniMaxH3ImageReference

from models.foundation.encoders.vae import picture_noise
from models.minimax_h3 import MiniMaxH3Pipeline
from tests.models import tiny_minimax_h3, tiny_minimax_h3_fl
from tests.models.tiny_hunyuan_video_i2v import PICTURE
from utils.diffusion.seeds import normal
from utils.media.decode import load_image
from utils.media.geometry import View
from utils.media.writing import tensor_to_image
from utils.settings.schema import SamplingSettings

STOCK, SIZES = tiny_minimax_h3.STOCK, tiny_minimax_h3.SIZES
SAMPLING = {**tiny_minimax_h3.SAMPLING, "control_images": [[str(PICTURE)] * 2]}
features, whole = tiny_minimax_h3_fl.features, tiny_minimax_h3.whole


def write_folder(folder: Path, **changes: Any) -> Path:
    """With the transformer for references, and none for the others, and with what says how clips are prepared."""
    tiny_minimax_h3.write_folder(folder, **changes)
    size = {"size": {"shortest_edge": 1024, "longest_edge": 2**20}}
    (folder / "processor" / "video_preprocessor_config.json").write_text(json.dumps(size))
    (folder / "transformer").rename(folder / "transformer_ref")
    return folder


def pipeline(folder: Path, **options: Any) -> MiniMaxH3Pipeline:
    return tiny_minimax_h3.pipeline(folder, **{"from_references": True, **options})


def features_of_pictures(latent_shape: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """References for each clip of a batch, in sizes of their own: two pictures, and a clip between them."""
    channels, _, height, width = latent_shape
    sizes = {
        "control_latents": (1, height, width),
        "control_2_latents": (5, height + 2, width - 2),
        "control_3_latents": (1, height - 2, width),
    }
    return {name: normal((2, channels, *size), 0, name) for name, size in sizes.items()}


def draw(stock: Any, sampling: SamplingSettings, noise: torch.Tensor) -> torch.Tensor:
    """With the picture as it is cropped for the sample, and our noise on it; of sound there is none."""
    # The pipeline itself brings pixels into the units of the VAE.
    stock.vae.__class__ = AutoencoderKLMiniMaxH3
    # It asks how latents of sound are in any case.
    sound = {"latents_mean": [0.0], "latents_std": [1.0], "latent_channels": tiny_minimax_h3.SOUND}
    stock.audio_vae = SimpleNamespace(config=SimpleNamespace(**sound))
    stock.update_components(reference_image_short_edge=min(sampling.width, sampling.height))
    pixels_C1HW = load_image(PICTURE, View(sampling.width, sampling.height, "center"))
    on_picture = picture_noise(pixels_C1HW[None], noise[:, :, :1])

    def given(shape: tuple[int, ...], **how: Any) -> torch.Tensor:
        return on_picture if on_picture.shape == shape else torch.zeros(shape)

    references = [MiniMaxH3ImageReference(tensor_to_image(pixels_C1HW))] * 2
    with mock.patch.object(before_denoise, "randn_tensor", given):
        return tiny_minimax_h3.draw(stock, sampling, noise, references=references)
