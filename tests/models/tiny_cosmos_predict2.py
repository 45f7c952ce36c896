"""A whole tiny Cosmos-Predict2 of text to image in diffusers' layout; `tiny_cosmos_predict2_v2w` is that of video to
world."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import (
    AutoencoderKLWan,
    Cosmos2TextToImagePipeline,
    CosmosTransformer3DModel,
    FlowMatchEulerDiscreteScheduler,
)
from diffusers.models.transformers import transformer_cosmos
from torch.nn import functional
from transformers import PreTrainedTokenizerFast, T5EncoderModel

from models.cosmos_predict2 import CosmosPredict2Options, CosmosPredict2Pipeline
from tests.models import tiny_wan
from tests.models.tiny_flux import MINI_FLUX
from tests.models.tiny_folder import drawn, of_true_length, randomised, write_index
from utils.dataset.batches import pad_ragged
from utils.diffusion.seeds import normal
from utils.settings.run_tables import SamplingSettings

if not hasattr(transformer_cosmos, "transforms"):
    # Of torchvision, which need not be installed, the stock module uses this alone.
    transformer_cosmos.transforms = SimpleNamespace(
        functional=SimpleNamespace(resize=lambda mask, size, interpolation: functional.interpolate(mask, size)),
        InterpolationMode=SimpleNamespace(NEAREST="nearest"),
    )


class NothingToJudge:
    """In the place of NVIDIA's guardrail, a package of its own, without which the stock pipeline draws nothing.
    Diffusers' tests do the same. The weights here are random: no model of NVIDIA is run, and what is drawn are
    latents."""

    def to(self, device: Any) -> None: ...

    def check_text_safety(self, prompt: str) -> bool:
        return True


class StockPipeline(Cosmos2TextToImagePipeline):
    """Without the guardrail's package."""

    def __init__(
        self, text_encoder: Any, tokenizer: Any, transformer: Any, vae: Any, scheduler: Any, safety_checker: Any = None
    ):
        super().__init__(text_encoder, tokenizer, transformer, vae, scheduler, safety_checker or NothingToJudge())


STOCK = StockPipeline
SAMPLING = {"width": 48, "height": 32, "guidance": 4.0, "negative_prompt": "blurred"}
TEXT_TOKENS, TEXT_WIDTH, CHANNELS = 24, 64, 4
TRANSFORMER = {
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "num_attention_heads": 2,
    "attention_head_dim": 24,
    "num_layers": 3,
    "mlp_ratio": 2,
    "text_embed_dim": TEXT_WIDTH,
    "adaln_lora_dim": 4,
    "max_size": (8, 32, 32),
    "rope_scale": (1.0, 4.0, 3.0),
    "extra_pos_embed_type": None,
}


def write_folder(folder: Path, stock: type = Cosmos2TextToImagePipeline, **changes: Any) -> Path:
    """`changes` are the transformer's."""
    torch.manual_seed(0)
    for part, source in {"text_encoder": "text_encoder_2", "tokenizer": "tokenizer_2"}.items():
        (folder / part).symlink_to(MINI_FLUX / source)
    randomised(CosmosTransformer3DModel(**{**TRANSFORMER, **changes}), 1).save_pretrained(folder / "transformer")
    randomised(AutoencoderKLWan(**tiny_wan.VAE), 2).save_pretrained(folder / "vae")
    FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True).save_pretrained(folder / "scheduler")
    parts = {
        "text_encoder": T5EncoderModel,
        "tokenizer": PreTrainedTokenizerFast,
        "transformer": CosmosTransformer3DModel,
        "vae": AutoencoderKLWan,
        "scheduler": FlowMatchEulerDiscreteScheduler,
    }
    write_index(folder, stock, parts)
    return folder


def pipeline(folder: Path, **options: Any) -> CosmosPredict2Pipeline:
    options = {"dtype": "float32", "max_sequence_length": TEXT_TOKENS, **options}
    return CosmosPredict2Pipeline(CosmosPredict2Options(type="cosmos_predict2", diffusers_path=folder, **options))


def features(lengths: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Random text features of these many tokens each."""
    return {"t5": pad_ragged([normal((length, TEXT_WIDTH), 0, "text", length) for length in lengths])}


def whole(
    denoiser: CosmosTransformer3DModel,
    pipeline: CosmosPredict2Pipeline,
    features: dict,
    x_t: torch.Tensor,
    t_B: torch.Tensor,
    **keys: Any,
) -> torch.Tensor:
    height, width = (side * 8 for side in x_t.shape[3:])
    text_BLD = functional.pad(features["t5"], (0, 0, 0, TEXT_TOKENS - features["t5"].shape[1]))
    keys["padding_mask"] = torch.zeros(1, 1, height, width)
    return denoiser(x_t, t_B, text_BLD, return_dict=False, **keys)[0]


def prompt_features(stock: StockPipeline, captions: list[str]) -> list[dict[str, torch.Tensor]]:
    text_BLD, _ = stock.encode_prompt(captions, None, False, max_sequence_length=TEXT_TOKENS, device="cpu")
    lengths = [min(len(stock.tokenizer(caption).input_ids), TEXT_TOKENS) for caption in captions]
    return of_true_length("t5", text_BLD, lengths)


SIZES = [(48, 32, 1), (32, 64, 1)]
stock_latents = tiny_wan.stock_latents


def draw(stock: StockPipeline, sampling: SamplingSettings, noise: torch.Tensor) -> torch.Tensor:
    return drawn(stock, sampling, noise, max_sequence_length=TEXT_TOKENS).images.unsqueeze(2)
