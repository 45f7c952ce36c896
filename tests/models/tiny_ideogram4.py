"""A whole tiny Ideogram 4 in diffusers' layout, with random weights; the VAE is tiny Flux.2's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Ideogram4Transformer2DModel
from diffusers import Ideogram4Pipeline as StockPipeline
from einops import rearrange
from transformers import Qwen2Tokenizer, Qwen3VLModel

from models.ideogram4 import LAYERS, Ideogram4Options, Ideogram4Pipeline
from tests.models import tiny_flux2, tiny_krea2, tiny_qwen_image
from tests.models.tiny_folder import of_true_length, ragged, randomised, write_index
from utils.settings.run_tables import SamplingSettings

STOCK = StockPipeline
SAMPLING = {"width": 96, "height": 64, "guidance": 1.0}
TEXT_TOKENS, TEXT_WIDTH, CHANNELS = 640, 8, tiny_flux2.CHANNELS
"""With a byte a token, the longest caption that is tried has 554 with its chat; the stock pipeline cuts none."""
SUMMED_OTHERWISE = ("input_proj.", "llm_cond_")
"""The stock module embeds every place as picture and as text, and multiplies by zero where it is not."""
TRANSFORMER = {
    "in_channels": 4 * CHANNELS,
    "num_layers": 3,
    "attention_head_dim": 8,
    "num_attention_heads": 3,
    "intermediate_size": 48,
    "adaln_dim": 12,
    "llm_features_dim": len(LAYERS) * TEXT_WIDTH,
    "rope_theta": 10000,
    "mrope_section": (2, 1, 1),
}
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% for part in message.content %}{{ part.text }}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_folder(folder: Path, *, layers: int = max(LAYERS) + 1, **changes: Any) -> Path:
    """`layers` are the text encoder's, `changes` the transformer's."""
    words = tiny_qwen_image.tokenizer()
    words.chat_template = CHAT_TEMPLATE
    words.save_pretrained(folder / "tokenizer")
    tiny_flux2.vae().save_pretrained(folder / "vae")
    torch.manual_seed(0)
    for seed, part in ((1, "transformer"), (4, "unconditional_transformer")):
        made = Ideogram4Transformer2DModel(**{**TRANSFORMER, **changes})
        randomised(made, seed).save_pretrained(folder / part)
    tiny_krea2.text_encoder(TEXT_WIDTH, layers).save_pretrained(folder / "text_encoder")
    FlowMatchEulerDiscreteScheduler().save_pretrained(folder / "scheduler")
    parts = {
        "scheduler": FlowMatchEulerDiscreteScheduler,
        "text_encoder": Qwen3VLModel,
        "tokenizer": Qwen2Tokenizer,
        "transformer": Ideogram4Transformer2DModel,
        "unconditional_transformer": Ideogram4Transformer2DModel,
        "vae": AutoencoderKLFlux2,
        "prompt_enhancer_head": None,
    }
    write_index(folder, STOCK, parts)
    return folder


def pipeline(folder: Path, **options: Any) -> Ideogram4Pipeline:
    options = {"dtype": "float32", "max_sequence_length": TEXT_TOKENS, **options}
    return Ideogram4Pipeline(Ideogram4Options(type="ideogram4", diffusers_path=folder, **options), seed=0)


def features(lengths: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Random text features of these many tokens each."""
    return ragged("qwen3_vl", lengths, TRANSFORMER["llm_features_dim"])


def whole(
    denoiser: Ideogram4Transformer2DModel,
    pipeline: Ideogram4Pipeline,
    features: dict,
    x_t: torch.Tensor,
    t_B: torch.Tensor,
) -> torch.Tensor:
    lengths, (height, width) = features["qwen3_vl_mask"].sum(1).tolist(), x_t.shape[2:]
    longest, tokens_BTC = max(lengths), rearrange(x_t, "b c h w -> b (h w) c")
    place, segment, indicator = StockPipeline._prepare_ids(lengths, height, width, longest, torch.device("cpu"))
    text_BSF = torch.zeros(*segment.shape, TRANSFORMER["llm_features_dim"])
    for row_SF, text_LF, length in zip(text_BSF, features["qwen3_vl"], lengths, strict=True):
        row_SF[longest - length : longest] = text_LF[:length]
    (output_BSC,) = denoiser(
        hidden_states=torch.cat([torch.zeros(len(x_t), longest, x_t.shape[1]), tokens_BTC], dim=1),
        timestep=1 - t_B,
        encoder_hidden_states=text_BSF,
        position_ids=place,
        segment_ids=segment,
        indicator=indicator,
        return_dict=False,
    )
    return rearrange(output_BSC[:, longest:], "b (h w) c -> b c h w", h=height)


def prompt_features(stock: StockPipeline, captions: list[str]) -> list[dict[str, torch.Tensor]]:
    text_BSF, _, segment, _ = stock.encode_prompt(captions, 1, 1, TEXT_TOKENS, torch.device("cpu"))
    lengths = ((segment == 1).sum(1) - 1).tolist()
    rows = [row[TEXT_TOKENS - length : TEXT_TOKENS] for row, length in zip(text_BSF, lengths, strict=True)]
    return of_true_length("qwen3_vl", rows, lengths)


def stock_latents(stock: StockPipeline, pixels_BCFHW: torch.Tensor) -> torch.Tensor:
    """The inverse of what its pipeline does before it decodes."""
    cells = stock.vae.encode(pixels_BCFHW[:, :, 0]).latent_dist.mode()
    batch, channels, height, width = cells.shape
    patches = cells.view(batch, channels, height // 2, 2, width // 2, 2).permute(0, 3, 5, 1, 2, 4).flatten(1, 3)
    mean, variance = (one.view(1, -1, 1, 1) for one in (stock.vae.bn.running_mean, stock.vae.bn.running_var))
    return (patches - mean) / torch.sqrt(variance + stock.vae.config.batch_norm_eps)


def draw(stock: StockPipeline, sampling: SamplingSettings, noise: torch.Tensor) -> torch.Tensor:
    tokens_BTC = stock(
        prompt=sampling.prompts[0],
        width=sampling.width,
        height=sampling.height,
        num_inference_steps=sampling.steps,
        guidance_scale=sampling.guidance,
        guidance_schedule=None,
        max_sequence_length=TEXT_TOKENS,
        latents=rearrange(noise, "b c h w -> b (h w) c"),
        output_type="latent",
    ).images
    return rearrange(tokens_BTC, "b (h w) c -> b c h w", h=noise.shape[2])
