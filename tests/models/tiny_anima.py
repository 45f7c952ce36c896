"""A whole tiny Anima in diffusers' layout, with random weights; the VAE is tiny Qwen-Image's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AnimaAutoBlocks,
    AnimaModularPipeline,
    AnimaTextConditioner,
    AutoencoderKLQwenImage,
    ClassifierFreeGuidance,
    CosmosTransformer3DModel,
    FlowMatchEulerDiscreteScheduler,
)
from diffusers.modular_pipelines.anima.encoders import AnimaTextEncoderStep
from transformers import AutoTokenizer, Qwen2Tokenizer, Qwen3Config, Qwen3Model, T5TokenizerFast

from models.anima import AnimaOptions, AnimaPipeline
from models.foundation.layers.ensemble import Ensemble
from tests.models import tiny_cosmos_predict2, tiny_qwen_image, tiny_z_image
from tests.models.tiny_flux import MINI_FLUX
from tests.models.tiny_folder import of_true_length, ragged, randomised, write_index
from utils.dataset.batches import pad_ragged
from utils.settings.run_tables import SamplingSettings

SAMPLING = {"width": 96, "height": 64, "guidance": 3.0, "negative_prompt": "blurred"}
TEXT_TOKENS, CHANNELS = 40, tiny_qwen_image.CHANNELS
TRANSFORMER = {**tiny_cosmos_predict2.TRANSFORMER, "in_channels": CHANNELS, "text_embed_dim": 24, "num_layers": 4}
TEXT = {**tiny_z_image.TEXT, "num_hidden_layers": 2}
CONDITIONER = {
    "source_dim": TEXT["hidden_size"],
    "target_dim": TRANSFORMER["text_embed_dim"],
    "model_dim": 32,
    "num_layers": 2,
    "num_attention_heads": 2,
    "min_sequence_length": TEXT_TOKENS,
}
PARTS = {
    "text_encoder": Qwen3Model,
    "text_conditioner": AnimaTextConditioner,
    "transformer": CosmosTransformer3DModel,
    "vae": AutoencoderKLQwenImage,
}


CUT = {"partition_method": "uniform"}
"""Its text weighs more than its blocks."""


class Stock:
    """The stock pipeline, which is modular, from a folder."""

    @staticmethod
    def from_pretrained(folder: Path) -> AnimaModularPipeline:
        stock = AnimaAutoBlocks().init_pipeline()
        stock.update_components(
            **{name: part.from_pretrained(folder / name) for name, part in PARTS.items()},
            **{name: AutoTokenizer.from_pretrained(folder / name) for name in ("tokenizer", "t5_tokenizer")},
            scheduler=FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler"),
        )
        return stock


STOCK = Stock


def write_folder(folder: Path, *, conditioner: dict[str, Any] | None = None, **changes: Any) -> Path:
    """`conditioner` are changes of the text conditioner, `changes` are the transformer's."""
    torch.manual_seed(0)
    (folder / "t5_tokenizer").symlink_to(MINI_FLUX / "tokenizer_2")
    words = len(AutoTokenizer.from_pretrained(folder / "t5_tokenizer"))
    tiny_z_image.tokenizer().save_pretrained(folder / "tokenizer")
    made = AnimaTextConditioner(**{**CONDITIONER, "target_vocab_size": words, **(conditioner or {})})
    randomised(made, 4).save_pretrained(folder / "text_conditioner")
    randomised(CosmosTransformer3DModel(**{**TRANSFORMER, **changes}), 1).save_pretrained(folder / "transformer")
    randomised(AutoencoderKLQwenImage(**tiny_qwen_image.VAE), 2).save_pretrained(folder / "vae")
    randomised(Qwen3Model(Qwen3Config(**TEXT)), 3).save_pretrained(folder / "text_encoder")
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(folder / "scheduler")
    others = {
        "scheduler": FlowMatchEulerDiscreteScheduler,
        "tokenizer": Qwen2Tokenizer,
        "t5_tokenizer": T5TokenizerFast,
    }
    write_index(folder, AnimaModularPipeline, {**PARTS, **others})
    return folder


def pipeline(folder: Path, **options: Any) -> AnimaPipeline:
    options = {"dtype": "float32", "max_sequence_length": TEXT_TOKENS, **options}
    return AnimaPipeline(AnimaOptions(type="anima", diffusers_path=folder, **options), seed=0)


def features(lengths: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Random text features of these many tokens each, and a few more of T5."""
    tokens = [torch.arange(3, 5 + length) for length in lengths]
    masks = [torch.ones(len(row), dtype=torch.bool) for row in tokens]
    others = {"t5_tokens": pad_ragged(tokens), "t5_tokens_mask": pad_ragged(masks)}
    return {**ragged("qwen3", lengths, TEXT["hidden_size"]), **others}


def whole(denoiser: Any, pipeline: AnimaPipeline, features: dict, x_t: torch.Tensor, t_B: torch.Tensor) -> torch.Tensor:
    """Of the ensemble, or of the stock pipeline's transformer with the conditioner of the folder."""
    conditioner, transformer = getattr(denoiser, "text_conditioner", None), getattr(denoiser, "transformer", denoiser)
    if not isinstance(denoiser, Ensemble):
        conditioner = AnimaTextConditioner.from_pretrained(pipeline.options.diffusers_path / "text_conditioner")
    masks = [features[f"{name}_mask"].bool() for name in ("t5_tokens", "qwen3")]
    text_BLD = conditioner(features["qwen3"], features["t5_tokens"], *(None if mask.all() else mask for mask in masks))
    padding = torch.zeros(1, 1, *(side * 8 for side in x_t.shape[3:]))
    return transformer(x_t, t_B, text_BLD, padding_mask=padding, return_dict=False)[0]


def prompt_features(stock: AnimaModularPipeline, captions: list[str]) -> list[dict[str, torch.Tensor]]:
    made = []
    for caption in captions:
        # One at a time: alone a caption has no padding.
        text = AnimaTextEncoderStep.encode_prompt(
            stock, caption, prepare_unconditional_embeds=False, max_sequence_length=TEXT_TOKENS, device="cpu"
        )
        (qwen,) = of_true_length("qwen3", text["qwen_prompt_embeds"], [text["qwen_prompt_embeds"].shape[1]])
        (t5,) = of_true_length("t5_tokens", text["t5_input_ids"], [text["t5_input_ids"].shape[1]])
        made.append({**qwen, **t5})
    return made


stock_latents = tiny_qwen_image.stock_latents


def draw(stock: AnimaModularPipeline, sampling: SamplingSettings, noise: torch.Tensor) -> torch.Tensor:
    stock.update_components(guider=ClassifierFreeGuidance(guidance_scale=sampling.guidance))
    return stock(
        prompt=sampling.prompts[0],
        negative_prompt=sampling.negative_prompt,
        width=sampling.width,
        height=sampling.height,
        num_inference_steps=sampling.steps,
        max_sequence_length=TEXT_TOKENS,
        latents=noise,
        output="latents",
    )
