"""A whole tiny Qwen-Image-Layered in diffusers' layout, with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLQwenImage, QwenImageLayeredPipeline, QwenImageTransformer2DModel
from diffusers.pipelines.qwenimage import pipeline_qwenimage_layered
from PIL import Image

from models.qwen_image_layered import QwenImageLayeredOptions
from models.qwen_image_layered import QwenImageLayeredPipeline as Pipeline
from tests.models import tiny_qwen_image as plain
from tests.models.tiny_flux import MINI_FLUX
from tests.models.tiny_folder import randomised
from utils.diffusion.seeds import normal
from utils.media.decode import load_rgba
from utils.media.geometry import View
from utils.settings.run_tables import SamplingSettings


class StockPipeline(QwenImageLayeredPipeline):
    """Without what makes captions of pictures, which needs torchvision."""

    _optional_components = ["processor"]


STOCK = StockPipeline
LAYERS = 2
PIXELS = (4, 1 + LAYERS)
PICTURE = MINI_FLUX.parents[1] / "docs" / "quickstart.png"
SAMPLING = {**plain.SAMPLING, "control_images": [str(PICTURE)]}
CHANNELS = 6
"""The stock pipeline would take pixels for latents that have as many channels."""
CHANGES = {
    "use_layer3d_rope": True,
    "use_additional_t_cond": True,
    "in_channels": 4 * CHANNELS,
    "out_channels": CHANNELS,
}
VAE = {
    **plain.VAE,
    "input_channels": 4,
    "z_dim": CHANNELS,
    "latents_mean": [0.1, -0.2, 0.3, 0.0, -0.1, 0.2],
    "latents_std": [1.5, 0.7, 1.0, 2.0, 0.8, 1.2],
}


def write_folder(folder: Path, **changes: Any) -> Path:
    plain.write_folder(folder, **{**CHANGES, **changes})
    randomised(AutoencoderKLQwenImage(**VAE), 2).save_pretrained(folder / "vae")
    index = folder / "model_index.json"
    index.write_text(index.read_text().replace(plain.STOCK.__name__, QwenImageLayeredPipeline.__name__))
    return folder


def pipeline(folder: Path, **options: Any) -> Pipeline:
    keys = {"dtype": "float32", "layers": LAYERS, "max_sequence_length": plain.TEXT_TOKENS, **options}
    return Pipeline(QwenImageLayeredOptions(type="qwen_image_layered", diffusers_path=folder, **keys), seed=0)


def dataset_of(pictures: Path) -> dict[str, Any]:
    return {"directory": [{"path": str(pictures), "control_path": [str(pictures)] * LAYERS}]}


features = plain.features
prompt_features = plain.prompt_features


def features_of_pictures(latent_shape: tuple[int, ...], batch: int = 2) -> dict[str, torch.Tensor]:
    """Random features of the pictures that are taken apart."""
    channels, _, *size = latent_shape
    return {"rgba_latents": normal((batch, channels, 1, *size), 0, "whole")}


def packed(x_BCPhw: torch.Tensor) -> torch.Tensor:
    batch, channels, pictures, *size = x_BCPhw.shape
    return STOCK._pack_latents(x_BCPhw.transpose(1, 2).contiguous(), batch, channels, *size, pictures)


def whole(
    denoiser: QwenImageTransformer2DModel, pipeline: Pipeline, features: dict, x_t: torch.Tensor, t_B: torch.Tensor
) -> torch.Tensor:
    *_, pictures, height, width = x_t.shape
    tokens, mask_BL = packed(x_t), features["qwen2_5_vl_mask"]
    (output_BTC,) = denoiser(
        hidden_states=torch.cat([tokens, packed(features["rgba_latents"])], dim=1),
        timestep=t_B,
        encoder_hidden_states=features["qwen2_5_vl"],
        encoder_hidden_states_mask=None if mask_BL.all() else mask_BL,
        img_shapes=[[(1, height // 2, width // 2)] * (pictures + 1)] * len(x_t),
        additional_t_cond=torch.tensor([0] * len(x_t)),
        return_dict=False,
    )
    return STOCK._unpack_latents(output_BTC[:, : tokens.shape[1]], height * 8, width * 8, pictures - 1, 8)


def stock_latents(stock: Any, pixels_BCPHW: torch.Tensor) -> torch.Tensor:
    """It encodes one picture at a time, which has no other frames."""
    return torch.cat([stock._encode_vae_image(one, None) for one in pixels_BCPHW.split(1, dim=2)], dim=2)


def rgba_image(pixels_4HW: torch.Tensor) -> Image.Image:
    levels_4HW = ((pixels_4HW + 1) * 127.5).round().to(torch.uint8)
    return Image.fromarray(np.ascontiguousarray(levels_4HW.permute(1, 2, 0).numpy()), "RGBA")


def draw(stock: Any, sampling: SamplingSettings, noise: torch.Tensor) -> torch.Tensor:
    """At the size of the sample, where the stock pipeline knows two areas, both of which take long here. Its latents
    are overheard: when it is asked for them, it fails."""
    heard = []

    def listen(pipeline: Any, step: int, timestep: Any, known: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        heard.append(known["latents"])
        return known

    size = sampling.width, sampling.height
    picture = rgba_image(load_rgba(PICTURE, View(*size, "center"))[:, 0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline_qwenimage_layered, "calculate_dimensions", lambda area, ratio: size)
        stock(
            image=picture,
            prompt=sampling.prompts[0],
            negative_prompt=sampling.negative_prompt,
            true_cfg_scale=sampling.guidance,
            layers=LAYERS,
            num_inference_steps=sampling.steps,
            latents=packed(noise),
            output_type="pt",
            max_sequence_length=plain.TEXT_TOKENS,
            callback_on_step_end=listen,
        )
    return stock._unpack_latents(heard[-1], sampling.height, sampling.width, LAYERS, 8)
