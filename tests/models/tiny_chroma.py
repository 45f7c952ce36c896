"""A whole tiny Chroma in diffusers' layout: the miniature Flux's VAE and T5 with a transformer of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, ChromaTransformer2DModel, FlowMatchEulerDiscreteScheduler
from diffusers import ChromaPipeline as StockPipeline
from transformers import PreTrainedTokenizerFast, T5EncoderModel

from models.chroma import ChromaOptions, ChromaPipeline
from tests.models import tiny_flux
from tests.models.tiny_flux import MINI_FLUX
from tests.models.tiny_folder import of_true_length, ragged, randomised, write_index
from utils.settings.run_tables import SamplingSettings

STOCK = StockPipeline
SAMPLING = {"width": 96, "height": 64, "guidance": 4.0, "negative_prompt": "blurred"}
TEXT_TOKENS = 24
TRANSFORMER = {
    "patch_size": 1,
    "in_channels": 16,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 64,
    "axes_dims_rope": (4, 4, 8),
    "approximator_num_channels": 8,
    "approximator_hidden_dim": 16,
    "approximator_layers": 2,
}


def write_folder(folder: Path) -> Path:
    torch.manual_seed(0)
    for part, source in {"vae": "vae", "text_encoder": "text_encoder_2", "tokenizer": "tokenizer_2"}.items():
        (folder / part).symlink_to(MINI_FLUX / source)
    randomised(ChromaTransformer2DModel(**TRANSFORMER), 1).save_pretrained(folder / "transformer")
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(folder / "scheduler")
    parts = {
        "scheduler": FlowMatchEulerDiscreteScheduler,
        "text_encoder": T5EncoderModel,
        "tokenizer": PreTrainedTokenizerFast,
        "transformer": ChromaTransformer2DModel,
        "vae": AutoencoderKL,
        "feature_extractor": None,
        "image_encoder": None,
    }
    write_index(folder, STOCK, parts)
    return folder


def pipeline(folder: Path, **options: Any) -> ChromaPipeline:
    options = {"dtype": "float32", "max_sequence_length": TEXT_TOKENS, **options}
    return ChromaPipeline(ChromaOptions(type="chroma", diffusers_path=folder, **options), seed=0)


def features(lengths: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Random text features of these many tokens each."""
    return ragged("t5", lengths, 64)


def whole(
    denoiser: ChromaTransformer2DModel, pipeline: ChromaPipeline, features: dict, x_t: torch.Tensor, t_B: torch.Tensor
) -> torch.Tensor:
    """With a Boolean mask: the stock pipeline's mask of ones and zeros is added to the scores, which leaves the padding
    in."""
    height, width = x_t.shape[2:]
    image_mask_BT = torch.ones(len(t_B), height * width // 4, dtype=torch.bool)
    (output_BTC,) = denoiser(
        StockPipeline._pack_latents(x_t, *x_t.shape),
        features["t5"],
        t_B,
        StockPipeline._prepare_latent_image_ids(None, height // 2, width // 2, "cpu", torch.float32),
        torch.zeros(features["t5"].shape[1], 3),
        torch.cat([features["t5_mask"], image_mask_BT], dim=1),
        return_dict=False,
    )
    return StockPipeline._unpack_latents(output_BTC, height * 8, width * 8, 8)


def prompt_features(stock: StockPipeline, captions: list[str]) -> list[dict[str, torch.Tensor]]:
    text_BLD, mask_BL = stock._get_t5_prompt_embeds(captions, max_sequence_length=TEXT_TOKENS, device="cpu")
    lengths = mask_BL.sum(1).int().tolist()
    return of_true_length("t5", text_BLD, lengths)


stock_latents = tiny_flux.stock_latents


def draw(stock: StockPipeline, sampling: SamplingSettings, noise: torch.Tensor) -> torch.Tensor:
    """With the mask as what it means; see `whole`."""

    def as_booleans(_: Any, arguments: tuple, named: dict[str, Any]) -> tuple:
        return arguments, {**named, "attention_mask": named["attention_mask"].bool()}

    stock.transformer.register_forward_pre_hook(as_booleans, with_kwargs=True)
    keys = {"negative_prompt": sampling.negative_prompt, "max_sequence_length": TEXT_TOKENS}
    return tiny_flux.draw(stock, sampling, noise, **keys)
