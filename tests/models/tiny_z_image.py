"""A whole tiny Z-Image in diffusers' layout, with random weights; the VAE is the miniature Flux's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImageTransformer2DModel
from diffusers import ZImagePipeline as StockPipeline
from tokenizers.pre_tokenizers import ByteLevel
from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3Model

from models.z_image import ZImageOptions, ZImagePipeline
from tests.models import tiny_flux
from tests.models.tiny_flux import MINI_FLUX
from tests.models.tiny_folder import drawn, ragged, randomised, write_index
from utils.settings.run_tables import SamplingSettings

STOCK = StockPipeline
SAMPLING = {"width": 96, "height": 64, "guidance": 3.0, "negative_prompt": "blurred"}
TEXT_TOKENS, TEXT_WIDTH, CHANNELS = 64, 16, 4
# Its time embedding is 1024 wide whatever the rest: narrower blocks would leave it a stage to itself.
TRANSFORMER = {
    "in_channels": CHANNELS,
    "dim": 96,
    "n_layers": 3,
    "n_refiner_layers": 2,
    "n_heads": 4,
    "n_kv_heads": 4,
    "cap_feat_dim": TEXT_WIDTH,
    "axes_dims": [8, 8, 8],
    "axes_lens": [128, 32, 32],
}
TEXT = {
    "vocab_size": 300,
    "hidden_size": TEXT_WIDTH,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    "{% if not enable_thinking | default(true) %}<think>\n\n</think>\n\n{% endif %}"
)


def tokenizer() -> Qwen2Tokenizer:
    """Every byte is a token, and so are the marks of a chat."""
    letters = sorted(ByteLevel.alphabet())
    made = Qwen2Tokenizer(vocab={letter: number for number, letter in enumerate(letters)}, merges=[])
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    made.chat_template = CHAT_TEMPLATE
    return made


def write_folder(folder: Path, **changes: Any) -> Path:
    torch.manual_seed(0)
    (folder / "vae").symlink_to(MINI_FLUX / "vae")
    tokenizer().save_pretrained(folder / "tokenizer")
    randomised(ZImageTransformer2DModel(**{**TRANSFORMER, **changes}), 1).save_pretrained(folder / "transformer")
    randomised(Qwen3Model(Qwen3Config(**TEXT)), 2).save_pretrained(folder / "text_encoder")
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(folder / "scheduler")
    parts = {
        "scheduler": FlowMatchEulerDiscreteScheduler,
        "text_encoder": Qwen3Model,
        "tokenizer": Qwen2Tokenizer,
        "transformer": ZImageTransformer2DModel,
        "vae": AutoencoderKL,
    }
    write_index(folder, STOCK, parts)
    return folder


def pipeline(folder: Path, **options: Any) -> ZImagePipeline:
    options = {"dtype": "float32", "max_sequence_length": TEXT_TOKENS, **options}
    return ZImagePipeline(ZImageOptions(type="z_image", diffusers_path=folder, **options), seed=0)


def features(lengths: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Random text features of these many tokens each."""
    return ragged("qwen3", lengths, TEXT_WIDTH)


def whole(
    denoiser: ZImageTransformer2DModel, pipeline: ZImagePipeline, features: dict, x_t: torch.Tensor, t_B: torch.Tensor
) -> torch.Tensor:
    texts = [text_LD[mask_L] for text_LD, mask_L in zip(features["qwen3"], features["qwen3_mask"], strict=True)]
    (output,) = denoiser(list(x_t.unsqueeze(2).unbind()), 1 - t_B, texts, return_dict=False)
    return torch.stack(output).squeeze(2)


def prompt_features(stock: StockPipeline, captions: list[str]) -> list[dict[str, torch.Tensor]]:
    # The stock pipeline writes into the list that it is given.
    texts, _ = stock.encode_prompt([*captions], "cpu", False, max_sequence_length=TEXT_TOKENS)
    return [{"qwen3": text_LD, "qwen3_mask": torch.ones(len(text_LD), dtype=torch.bool)} for text_LD in texts]


stock_latents = tiny_flux.stock_latents


def draw(stock: StockPipeline, sampling: SamplingSettings, noise: torch.Tensor) -> torch.Tensor:
    return drawn(stock, sampling, noise, max_sequence_length=TEXT_TOKENS).images
