"""A whole tiny Cosmos 1.0 of text to world in diffusers' layout; `tiny_cosmos_v2w` is that of video to world."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLCosmos, CosmosTextToWorldPipeline, CosmosTransformer3DModel, EDMEulerScheduler
from transformers import PreTrainedTokenizerFast, T5EncoderModel

from models.cosmos import CosmosOptions, CosmosPipeline
from tests.models import tiny_cosmos_predict2
from tests.models.tiny_cosmos_predict2 import MINI_FLUX, TEXT_TOKENS, NothingToJudge
from tests.models.tiny_folder import drawn, randomised, write_index
from utils.settings.run_tables import SamplingSettings


class StockPipeline(CosmosTextToWorldPipeline):
    """Without the guardrail's package."""

    def __init__(
        self, text_encoder: Any, tokenizer: Any, transformer: Any, vae: Any, scheduler: Any, safety_checker: Any = None
    ):
        super().__init__(text_encoder, tokenizer, transformer, vae, scheduler, safety_checker or NothingToJudge())


STOCK = StockPipeline
SIZES = [(48, 32, 1), (32, 64, 9)]
"""A still and a clip."""
SAMPLING = {"width": 48, "height": 32, "frames": 9, "guidance": 4.0, "negative_prompt": "blurred"}
FPS, SIGMA_DATA, CHANNELS = 30, 0.5, 4
TRANSFORMER = {
    **tiny_cosmos_predict2.TRANSFORMER,
    "attention_head_dim": 18,
    "max_size": (4, 16, 24),
    "rope_scale": (2.0, 1.0, 1.0),
    "extra_pos_embed_type": "learnable",
}
VAE = {
    "latent_channels": CHANNELS,
    "encoder_block_out_channels": (8, 8, 8, 8),
    "decode_block_out_channels": (8, 8, 8, 8),
    "attention_resolutions": (8,),
    "resolution": 64,
    "num_layers": 1,
    "latents_mean": [0.1 * number - 0.5 for number in range(3 * CHANNELS)],
    "latents_std": [0.5 + 0.1 * number for number in range(3 * CHANNELS)],
}
"""With mean and deviation of three latent frames."""


def write_folder(folder: Path, stock: type = CosmosTextToWorldPipeline, **changes: Any) -> Path:
    """`changes` are the transformer's."""
    torch.manual_seed(0)
    for part, source in {"text_encoder": "text_encoder_2", "tokenizer": "tokenizer_2"}.items():
        (folder / part).symlink_to(MINI_FLUX / source)
    randomised(CosmosTransformer3DModel(**{**TRANSFORMER, **changes}), 1).save_pretrained(folder / "transformer")
    randomised(AutoencoderKLCosmos(**VAE), 2).save_pretrained(folder / "vae")
    EDMEulerScheduler(sigma_max=60.0, sigma_data=SIGMA_DATA, final_sigmas_type="sigma_min").save_pretrained(
        folder / "scheduler"
    )
    parts = {
        "text_encoder": T5EncoderModel,
        "tokenizer": PreTrainedTokenizerFast,
        "transformer": CosmosTransformer3DModel,
        "vae": AutoencoderKLCosmos,
        "scheduler": EDMEulerScheduler,
    }
    write_index(folder, stock, parts)
    return folder


def pipeline(folder: Path, **options: Any) -> CosmosPipeline:
    options = {"dtype": "float32", "max_sequence_length": TEXT_TOKENS, **options}
    return CosmosPipeline(CosmosOptions(type="cosmos", diffusers_path=folder, **options))


features = tiny_cosmos_predict2.features
prompt_features = tiny_cosmos_predict2.prompt_features


def whole(
    denoiser: CosmosTransformer3DModel,
    pipeline: CosmosPipeline,
    features: dict,
    x_t: torch.Tensor,
    t_B: torch.Tensor,
    **keys: Any,
) -> torch.Tensor:
    told_B = 0.25 * torch.log(t_B / (1 - t_B))
    return tiny_cosmos_predict2.whole(denoiser, pipeline, features, x_t, told_B, fps=FPS, **keys)


def stock_latents(stock: StockPipeline, pixels_BCFHW: torch.Tensor) -> torch.Tensor:
    """As the stock pipeline of video to world makes them."""
    config = stock.vae.config
    latents = stock.vae.encode(pixels_BCFHW).latent_dist.mode()
    mean, std = (
        torch.tensor(config[key]).view(1, config.latent_channels, -1, 1, 1)[:, :, : latents.shape[2]]
        for key in ("latents_mean", "latents_std")
    )
    return (latents - mean) * stock.scheduler.config.sigma_data / std


def draw(stock: StockPipeline, sampling: SamplingSettings, noise: torch.Tensor, **keys: Any) -> torch.Tensor:
    keys |= {"num_frames": sampling.frames, "fps": FPS, "max_sequence_length": TEXT_TOKENS}
    return drawn(stock, sampling, noise, **keys).frames
