"""A whole tiny Sana in diffusers' layout, with random weights; the tokenizer is the tiny Lumina's."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, SanaTransformer2DModel
from diffusers import SanaPipeline as StockPipeline
from transformers import Gemma2Config, Gemma2Model, GemmaTokenizer

from models.sana import SanaOptions, SanaPipeline
from tests.models import tiny_lumina2
from tests.models.tiny_folder import drawn, of_true_length, ragged, randomised, write_index
from utils.settings.run_tables import SamplingSettings

STOCK = StockPipeline
SIZES = [(32, 64, 1), (64, 32, 1)]
SAMPLING = {"width": 96, "height": 64, "guidance": 3.0}
"""The stock pipeline reads a negative prompt without an instruction, as an empty caption is read here."""
TEXT_TOKENS, TEXT_WIDTH, CHANNELS = 64, 16, 4
INSTRUCTION = inspect.signature(StockPipeline.__call__).parameters["complex_human_instruction"].default
TRANSFORMER = {
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "num_layers": 4,
    "num_attention_heads": 4,
    "attention_head_dim": 8,
    "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 16,
    "cross_attention_dim": 32,
    "caption_channels": TEXT_WIDTH,
    "sample_size": 8,
    "timestep_scale": 0.5,
}
VAE = {
    "latent_channels": CHANNELS,
    "attention_head_dim": 4,
    "encoder_block_types": ("ResBlock",) * 5 + ("EfficientViTBlock",),
    "decoder_block_types": ("ResBlock",) * 5 + ("EfficientViTBlock",),
    "encoder_block_out_channels": (8,) * 6,
    "decoder_block_out_channels": (8,) * 6,
    "encoder_layers_per_block": (1,) * 6,
    "decoder_layers_per_block": (1,) * 6,
    "encoder_qkv_multiscales": ((),) * 5 + ((5,),),
    "decoder_qkv_multiscales": ((),) * 5 + ((5,),),
    "scaling_factor": 0.41407,
}
SCHEDULER = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
CUT = {"partition_method": "uniform"}
"""What embeds the time takes more parameters than a tiny block."""


def write_folder(folder: Path, **changes: Any) -> Path:
    """`changes` are the transformer's."""
    torch.manual_seed(0)
    tiny_lumina2.tokenizer().save_pretrained(folder / "tokenizer")
    randomised(AutoencoderDC(**VAE), 3).save_pretrained(folder / "vae")
    randomised(SanaTransformer2DModel(**{**TRANSFORMER, **changes}), 1).save_pretrained(folder / "transformer")
    randomised(Gemma2Model(Gemma2Config(**tiny_lumina2.TEXT)), 2).save_pretrained(folder / "text_encoder")
    DPMSolverMultistepScheduler(**SCHEDULER).save_pretrained(folder / "scheduler")
    parts = {
        "scheduler": DPMSolverMultistepScheduler,
        "text_encoder": Gemma2Model,
        "tokenizer": GemmaTokenizer,
        "transformer": SanaTransformer2DModel,
        "vae": AutoencoderDC,
    }
    write_index(folder, STOCK, parts)
    return folder


def pipeline(folder: Path, **options: Any) -> SanaPipeline:
    options = {"dtype": "float32", "max_sequence_length": TEXT_TOKENS, **options}
    return SanaPipeline(SanaOptions(type="sana", diffusers_path=folder, **options), seed=0)


def features(lengths: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Random text features of these many tokens each."""
    return ragged("gemma2", lengths, TEXT_WIDTH)


def whole(
    denoiser: SanaTransformer2DModel, pipeline: SanaPipeline, features: dict, x_t: torch.Tensor, t_B: torch.Tensor
) -> torch.Tensor:
    mask_BL = features["gemma2_mask"]
    return denoiser(
        x_t,
        encoder_hidden_states=features["gemma2"],
        timestep=t_B * 1000 * denoiser.config.timestep_scale,
        encoder_attention_mask=None if mask_BL.all() else mask_BL.long(),
        return_dict=False,
    )[0]


def prompt_features(stock: StockPipeline, captions: list[str]) -> list[dict[str, torch.Tensor]]:
    """Those of an empty caption are the negative prompt's, which the stock pipeline reads without an instruction."""
    asked = {"max_sequence_length": TEXT_TOKENS, "complex_human_instruction": INSTRUCTION}
    prompts, masks, negative, negative_masks = stock.encode_prompt(captions, **asked)
    is_empty_B11 = torch.tensor([not caption for caption in captions])[:, None, None]
    texts = torch.where(is_empty_B11, negative, prompts)
    lengths = torch.where(is_empty_B11[..., 0], negative_masks, masks).sum(1).tolist()
    return of_true_length("gemma2", texts, lengths)


def stock_latents(stock: StockPipeline, pixels_BCFHW: torch.Tensor) -> torch.Tensor:
    return stock.vae.encode(pixels_BCFHW[:, :, 0]).latent * stock.vae.config.scaling_factor


def draw(stock: StockPipeline, sampling: SamplingSettings, noise: torch.Tensor) -> torch.Tensor:
    return drawn(stock, sampling, noise, max_sequence_length=TEXT_TOKENS, use_resolution_binning=False).images
