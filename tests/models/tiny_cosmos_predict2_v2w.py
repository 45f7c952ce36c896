"""A whole tiny Cosmos-Predict2 of video to world, which goes on from the first frame of a clip."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from diffusers import Cosmos2VideoToWorldPipeline, CosmosTransformer3DModel
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from models.cosmos_predict2 import CosmosPredict2Pipeline
from tests.models import tiny_cosmos_predict2, tiny_wan_i2v
from tests.models.tiny_cosmos_predict2 import NothingToJudge
from tests.models.tiny_folder import drawn
from utils.diffusion.seeds import normal
from utils.media.decode import load_image
from utils.media.geometry import View
from utils.media.writing import tensor_to_image
from utils.settings.run_tables import SamplingSettings


class StockPipeline(Cosmos2VideoToWorldPipeline):
    """Without the guardrail's package."""

    def __init__(
        self, text_encoder: Any, tokenizer: Any, transformer: Any, vae: Any, scheduler: Any, safety_checker: Any = None
    ):
        super().__init__(text_encoder, tokenizer, transformer, vae, scheduler, safety_checker or NothingToJudge())


STOCK = StockPipeline
SIZES = [(48, 32, 9), (32, 64, 5)]
PICTURE = tiny_wan_i2v.PICTURE
SAMPLING = {**tiny_cosmos_predict2.SAMPLING, "frames": 9, "control_images": [str(PICTURE)]}
GIVEN_TIME = 1e-4 / (1 + 1e-4)


def write_folder(folder: Path) -> Path:
    return tiny_cosmos_predict2.write_folder(
        folder, Cosmos2VideoToWorldPipeline, in_channels=tiny_cosmos_predict2.CHANNELS + 1
    )


pipeline = tiny_cosmos_predict2.pipeline
features = tiny_cosmos_predict2.features
prompt_features = tiny_cosmos_predict2.prompt_features
stock_latents = tiny_cosmos_predict2.stock_latents


def features_of_pictures(latent_shape: tuple[int, ...], batch: int = 2) -> dict[str, torch.Tensor]:
    """Random features of the first frames of a batch."""
    channels, _, height, width = latent_shape
    return {"first_frame_latents": normal((batch, channels, 1, height, width), 0, "first frame")}


def whole(
    denoiser: CosmosTransformer3DModel,
    pipeline: CosmosPredict2Pipeline,
    features: dict,
    x_t: torch.Tensor,
    t_B: torch.Tensor,
) -> torch.Tensor:
    """What the stock pipeline steps with: in the first frame that is the way to the picture."""
    first = features["first_frame_latents"]
    time_B1f11 = t_B.view(-1, 1, 1, 1, 1).repeat(1, 1, x_t.shape[2], 1, 1)
    time_B1f11[:, :, 0] = GIVEN_TIME
    mask = torch.zeros(len(x_t), 1, *x_t.shape[2:])
    mask[:, :, 0] = 1
    seen = torch.cat([first, x_t[:, :, 1:]], dim=2)
    keys = {"fps": 16, "condition_mask": mask}
    predicted = tiny_cosmos_predict2.whole(denoiser, pipeline, features, seen, time_B1f11, **keys)
    return torch.cat([(x_t[:, :, :1] - first) / t_B.view(-1, 1, 1, 1, 1), predicted[:, :, 1:]], dim=2)


def draw(stock: StockPipeline, sampling: SamplingSettings, noise: torch.Tensor) -> torch.Tensor:
    """With the mode of the picture's latents, of which the stock pipeline draws some."""
    picture = tensor_to_image(load_image(PICTURE, View(sampling.width, sampling.height, "center")))
    keys = {"image": picture, "num_frames": sampling.frames, "fps": 16, "max_sequence_length": 24}
    with patch.object(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode()):
        return drawn(stock, sampling, noise, **keys).frames
