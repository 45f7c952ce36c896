"""A whole tiny CogView4 in diffusers' layout, with random weights; the VAE is the miniature Flux's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, CogView4Transformer2DModel, FlowMatchEulerDiscreteScheduler
from diffusers import CogView4Pipeline as StockPipeline
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing
from transformers import GlmConfig, GlmModel, PreTrainedTokenizerFast

from models.cogview4 import CogView4Options, CogView4Pipeline, attending_to_own_text
from tests.models import tiny_flux
from tests.models.tiny_flux import MINI_FLUX
from tests.models.tiny_folder import drawn, ragged, randomised, write_index
from utils.settings.run_tables import SamplingSettings

STOCK = StockPipeline
SAMPLING = {"width": 96, "height": 64, "guidance": 3.0, "negative_prompt": "blurred"}
# No multiple of 16, to which a caption that was cut off is filled up all the same.
TEXT_TOKENS, TEXT_WIDTH, CHANNELS = 60, 16, 4
TRANSFORMER = {
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "num_layers": 3,
    "attention_head_dim": 8,
    "num_attention_heads": 4,
    "text_embed_dim": TEXT_WIDTH,
    "time_embed_dim": 32,
    "condition_dim": 8,
    "rope_axes_dim": (16, 16),
}
TEXT = {
    "vocab_size": 300,
    "hidden_size": TEXT_WIDTH,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "pad_token_id": 256,
    "eos_token_id": 256,
}
SCHEDULER = {"base_shift": 0.25, "max_shift": 0.75, "use_dynamic_shifting": True, "time_shift_type": "linear"}


def tokenizer() -> PreTrainedTokenizerFast:
    """Every byte is a token; two marks begin a text, and padding comes before it."""
    letters = sorted(ByteLevel.alphabet())
    words = Tokenizer(BPE(vocab={letter: number for number, letter in enumerate(letters)}, merges=[]))
    words.pre_tokenizer = ByteLevel(add_prefix_space=False)
    words.add_special_tokens(["<|endoftext|>", "[gMASK]", "<sop>"])
    marks = [(mark, words.token_to_id(mark)) for mark in ("[gMASK]", "<sop>")]
    words.post_processor = TemplateProcessing(single="[gMASK] <sop> $A", special_tokens=marks)
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<|endoftext|>", padding_side="left")


def write_folder(folder: Path, *, scheduler: dict[str, Any] | None = None, **changes: Any) -> Path:
    """`changes` are the transformer's."""
    torch.manual_seed(0)
    (folder / "vae").symlink_to(MINI_FLUX / "vae")
    tokenizer().save_pretrained(folder / "tokenizer")
    randomised(CogView4Transformer2DModel(**{**TRANSFORMER, **changes}), 1).save_pretrained(folder / "transformer")
    randomised(GlmModel(GlmConfig(**TEXT)), 2).save_pretrained(folder / "text_encoder")
    FlowMatchEulerDiscreteScheduler(**{**SCHEDULER, **(scheduler or {})}).save_pretrained(folder / "scheduler")
    parts = {
        "scheduler": FlowMatchEulerDiscreteScheduler,
        "text_encoder": GlmModel,
        "tokenizer": PreTrainedTokenizerFast,
        "transformer": CogView4Transformer2DModel,
        "vae": AutoencoderKL,
    }
    write_index(folder, STOCK, parts)
    return folder


def pipeline(folder: Path, **options: Any) -> CogView4Pipeline:
    options = {"dtype": "float32", "max_sequence_length": TEXT_TOKENS, **options}
    return CogView4Pipeline(CogView4Options(type="cogview4", diffusers_path=folder, **options), seed=0)


def features(lengths: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Random text features of these many tokens each."""
    return ragged("glm", lengths, TEXT_WIDTH)


def whole(
    denoiser: CogView4Transformer2DModel,
    pipeline: CogView4Pipeline,
    features: dict,
    x_t: torch.Tensor,
    t_B: torch.Tensor,
) -> torch.Tensor:
    """With our attention, since the stock one sees the padding; what is told of the time is seen in drawn samples."""
    inputs = pipeline.prepare_inputs(features, x_t, t_B)
    sizes_B2 = torch.tensor([[8.0 * side for side in x_t.shape[2:]]] * len(x_t))
    return attending_to_own_text(denoiser)(
        hidden_states=x_t,
        encoder_hidden_states=features["glm"],
        timestep=inputs.time_B,
        original_size=sizes_B2,
        target_size=sizes_B2,
        crop_coords=torch.zeros(len(x_t), 2),
        attention_mask=inputs.text_lengths,
        return_dict=False,
    )[0]


def prompt_features(stock: StockPipeline, captions: list[str]) -> list[dict[str, torch.Tensor]]:
    """One after the other: the stock pipeline lets a caption see the padding of its batch."""
    texts = [stock.encode_prompt(caption, None, False, max_sequence_length=TEXT_TOKENS)[0][0] for caption in captions]
    return [{"glm": text_LD, "glm_mask": torch.ones(len(text_LD), dtype=torch.bool)} for text_LD in texts]


stock_latents = tiny_flux.stock_latents


def draw(stock: StockPipeline, sampling: SamplingSettings, noise: torch.Tensor) -> torch.Tensor:
    return drawn(stock, sampling, noise, max_sequence_length=TEXT_TOKENS).images
