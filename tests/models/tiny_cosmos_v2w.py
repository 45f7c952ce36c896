"""A whole tiny Cosmos 1.0 of video to world, which goes on from the first frame of a clip."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import CosmosTransformer3DModel, CosmosVideoToWorldPipeline

from models.cosmos import CosmosPipeline
from tests.models import tiny_cosmos, tiny_cosmos_predict2_v2w
from tests.models.tiny_cosmos_predict2 import NothingToJudge
from tests.models.tiny_cosmos_predict2_v2w import PICTURE
from utils.media.decode import load_image
from utils.media.geometry import View
from utils.media.writing import tensor_to_image
from utils.settings.run_tables import SamplingSettings


class StockPipeline(CosmosVideoToWorldPipeline):
    """Without the guardrail's package."""

    def __init__(
        self, text_encoder: Any, tokenizer: Any, transformer: Any, vae: Any, scheduler: Any, safety_checker: Any = None
    ):
        super().__init__(text_encoder, tokenizer, transformer, vae, scheduler, safety_checker or NothingToJudge())


STOCK = StockPipeline
SIZES = [(48, 32, 17), (32, 64, 9)]
SAMPLING = {**tiny_cosmos.SAMPLING, "control_images": [str(PICTURE)]}
features = tiny_cosmos.features
pipeline = tiny_cosmos.pipeline
prompt_features = tiny_cosmos.prompt_features
stock_latents = tiny_cosmos.stock_latents
features_of_pictures = tiny_cosmos_predict2_v2w.features_of_pictures


def write_folder(folder: Path) -> Path:
    return tiny_cosmos.write_folder(folder, CosmosVideoToWorldPipeline, in_channels=tiny_cosmos.CHANNELS + 1)


def whole(
    denoiser: CosmosTransformer3DModel,
    pipeline: CosmosPipeline,
    features: dict,
    x_t: torch.Tensor,
    t_B: torch.Tensor,
) -> torch.Tensor:
    """With the first frame in the place of what the model predicts of it, as the stock pipeline has it: that its
    scheduler makes the picture of this, the samples show."""
    first = features["first_frame_latents"]
    mask = torch.zeros(len(x_t), 1, *x_t.shape[2:])
    mask[:, :, 0] = 1
    seen = torch.cat([first / tiny_cosmos.SIGMA_DATA, x_t[:, :, 1:]], dim=2)
    predicted = tiny_cosmos.whole(denoiser, pipeline, features, seen, t_B, condition_mask=mask)
    given = pipeline.objective.prediction_of(first, x_t[:, :, :1], t_B)
    return torch.cat([given, predicted[:, :, 1:]], dim=2)


def draw(stock: StockPipeline, sampling: SamplingSettings, noise: torch.Tensor) -> torch.Tensor:
    """Without the noise that the stock pipeline adds to the picture, a thousandth."""
    picture = tensor_to_image(load_image(PICTURE, View(sampling.width, sampling.height, "center")))
    return tiny_cosmos.draw(stock, sampling, noise, image=picture, augment_sigma=0.0)
