"""A whole tiny Lumina Image 2.0 in diffusers' layout, with random weights; the VAE is the miniature Flux's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, Lumina2Transformer2DModel
from diffusers import Lumina2Pipeline as StockPipeline
from tokenizers.processors import TemplateProcessing
from transformers import Gemma2Config, Gemma2Model, GemmaTokenizer

from models.lumina2 import Lumina2Options, Lumina2Pipeline
from tests.models import tiny_flux
from tests.models.tiny_flux import MINI_FLUX
from tests.models.tiny_folder import drawn, of_true_length, ragged, randomised, write_index
from utils.settings.run_tables import SamplingSettings

STOCK = StockPipeline
SAMPLING = {"width": 96, "height": 64, "guidance": 3.0}
# The system prompt alone is some 170 of them.
TEXT_TOKENS, TEXT_WIDTH, CHANNELS = 256, 16, 4
TRANSFORMER = {
    "in_channels": CHANNELS,
    "hidden_size": 96,
    "num_layers": 3,
    "num_refiner_layers": 2,
    "num_attention_heads": 4,
    "num_kv_heads": 2,
    "multiple_of": 8,
    "axes_dim_rope": [8, 8, 8],
    "axes_lens": [300, 32, 32],
    "cap_feat_dim": TEXT_WIDTH,
}
MARKS = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>")
TEXT = {
    "vocab_size": 300,
    "hidden_size": TEXT_WIDTH,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "query_pre_attn_scalar": 8,
}


def tokenizer() -> GemmaTokenizer:
    """Every byte is a token, and so is a space; a mark begins a text."""
    words = [*MARKS, *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    made = GemmaTokenizer(vocab={word: number for number, word in enumerate(words)}, merges=[])
    marks = [("<bos>", made.bos_token_id)]
    made.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=marks)
    return made


def write_folder(folder: Path, **changes: Any) -> Path:
    """`changes` are the transformer's."""
    torch.manual_seed(0)
    (folder / "vae").symlink_to(MINI_FLUX / "vae")
    tokenizer().save_pretrained(folder / "tokenizer")
    randomised(Lumina2Transformer2DModel(**{**TRANSFORMER, **changes}), 1).save_pretrained(folder / "transformer")
    randomised(Gemma2Model(Gemma2Config(**TEXT)), 2).save_pretrained(folder / "text_encoder")
    FlowMatchEulerDiscreteScheduler(shift=6.0).save_pretrained(folder / "scheduler")
    parts = {
        "scheduler": FlowMatchEulerDiscreteScheduler,
        "text_encoder": Gemma2Model,
        "tokenizer": GemmaTokenizer,
        "transformer": Lumina2Transformer2DModel,
        "vae": AutoencoderKL,
    }
    write_index(folder, STOCK, parts)
    return folder


def pipeline(folder: Path, **options: Any) -> Lumina2Pipeline:
    options = {"dtype": "float32", "max_sequence_length": TEXT_TOKENS, **options}
    return Lumina2Pipeline(Lumina2Options(type="lumina2", diffusers_path=folder, **options), seed=0)


def features(lengths: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Random text features of these many tokens each."""
    return ragged("gemma2", lengths, TEXT_WIDTH)


def whole(
    denoiser: Lumina2Transformer2DModel, pipeline: Lumina2Pipeline, features: dict, x_t: torch.Tensor, t_B: torch.Tensor
) -> torch.Tensor:
    return denoiser(x_t, 1 - t_B, features["gemma2"], features["gemma2_mask"], return_dict=False)[0]


def prompt_features(stock: StockPipeline, captions: list[str]) -> list[dict[str, torch.Tensor]]:
    """Those of an empty caption are the negative prompt's, which the stock pipeline reads without a system prompt."""
    prompts, masks, negative, negative_masks = stock.encode_prompt(captions, max_sequence_length=TEXT_TOKENS)
    is_empty_B11 = torch.tensor([not caption for caption in captions])[:, None, None]
    texts = torch.where(is_empty_B11, negative, prompts)
    lengths = torch.where(is_empty_B11[..., 0], negative_masks, masks).sum(1).tolist()
    return of_true_length("gemma2", texts, lengths)


stock_latents = tiny_flux.stock_latents


def draw(stock: StockPipeline, sampling: SamplingSettings, noise: torch.Tensor) -> torch.Tensor:
    return drawn(stock, sampling, noise, max_sequence_length=TEXT_TOKENS).images
