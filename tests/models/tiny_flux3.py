"""A whole tiny Flux.3 in diffusers' layout, with random weights. Its stock pipeline is put together of blocks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLFlux2,
    ClassifierFreeGuidance,
    Flux3AutoBlocks,
    Flux3ModularPipeline,
    Flux3Transformer2DModel,
)
from diffusers.models.transformers.transformer_flux3 import Flux3AttnProcessor
from diffusers.modular_pipelines.flux3 import before_denoise
from diffusers.modular_pipelines.flux3.encoders import Flux3TextEncoderStep, Flux3VaeEncoderStep
from einops import rearrange
from torch import nn
from transformers import Qwen2Tokenizer, Qwen3VLForConditionalGeneration

from models.flux3 import LAYERS, Flux3Options, Flux3Pipeline, OwnTextAttention, Places
from tests.models import tiny_flux2, tiny_qwen_image, tiny_qwen_image_21, tiny_z_image
from tests.models.tiny_folder import ragged, randomised
from utils.settings.run_tables import SamplingSettings

SAMPLING = {"width": 96, "height": 64, "guidance": 3.0, "negative_prompt": "blurred"}
TEXT_TOKENS, TEXT_WIDTH = 160, tiny_qwen_image_21.TEXT_WIDTH
"""Two windows: of the captions of the generic tests, one is longer."""
FEATURES = len(LAYERS) * TEXT_WIDTH
CUT = {"partition_method": "uniform"}
"""What embeds the text takes more parameters than a tiny block."""
ROUNDED_OTHERWISE = True
"""The stock module repeats the time for every token before it makes modulations of it, whose gradients it sums last."""
TRANSFORMER = {
    "in_channels": 4 * tiny_flux2.CHANNELS,
    "cond_in_channels": 4 * tiny_flux2.CHANNELS,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": FEATURES,
    "timestep_channels": 32,
    "axes_dims_rope": (4, 4, 4, 4),
}


class TextProcessor:
    """What the stock pipeline asks of its processor, which needs torchvision."""

    def __init__(self, tokenizer: Qwen2Tokenizer):
        self.tokenizer = tokenizer

    def apply_chat_template(self, messages: list[dict[str, str]], **how: Any) -> str:
        return self.tokenizer.apply_chat_template(messages, **how)


class StockPipeline(Flux3ModularPipeline):
    """Without the language model that writes longer prompts; of a folder without the addresses of its parts."""

    @classmethod
    def from_pretrained(cls, folder: Path) -> StockPipeline:
        blocks = Flux3AutoBlocks()
        blocks.sub_blocks.pop("prompt_upsampler")
        made = cls(blocks=blocks)
        made.update_components(
            text_encoder=Qwen3VLForConditionalGeneration.from_pretrained(folder / "text_encoder"),
            tokenizer=TextProcessor(Qwen2Tokenizer.from_pretrained(folder / "tokenizer")),
            transformer=Flux3Transformer2DModel.from_pretrained(folder / "transformer"),
            vae=AutoencoderKLFlux2.from_pretrained(folder / "vae"),
        )
        return made


STOCK = StockPipeline


def tokenizer() -> Qwen2Tokenizer:
    """That of the tiny Qwen-Image, with a chat template."""
    made = tiny_qwen_image.tokenizer()
    made.chat_template = tiny_z_image.CHAT_TEMPLATE
    return made


def write_folder(folder: Path, **changes: Any) -> Path:
    """`changes` are the transformer's."""
    torch.manual_seed(0)
    tokenizer().save_pretrained(folder / "tokenizer")
    tiny_flux2.vae().save_pretrained(folder / "vae")
    randomised(Flux3Transformer2DModel(**{**TRANSFORMER, **changes}), 1).save_pretrained(folder / "transformer")
    # One layer more than are read: transformers normalises the last of the hidden states.
    tiny_qwen_image_21.text_encoder(max(LAYERS) + 1).save_pretrained(folder / "text_encoder")
    index = {"_class_name": Flux3ModularPipeline.__name__, "_blocks_class_name": Flux3AutoBlocks.__name__}
    (folder / "modular_model_index.json").write_text(json.dumps(index))
    return folder


def pipeline(folder: Path, **options: Any) -> Flux3Pipeline:
    options = {"dtype": "float32", "max_sequence_length": TEXT_TOKENS, **options}
    return Flux3Pipeline(Flux3Options(type="flux3", diffusers_path=folder, **options), seed=0)


def features(lengths: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Random text features of these many tokens each."""
    return ragged("qwen3_vl", lengths, FEATURES)


def packed(x_BChw: torch.Tensor) -> torch.Tensor:
    return x_BChw.flatten(2).transpose(1, 2)


class ToldOfText:
    """Our attention in the stock module, which cannot be told of lengths."""

    def __init__(self, length: int, mask_BL: torch.Tensor):
        self.length, self.lengths = length, tuple(torch.empty(own, 0) for own in mask_BL.sum(dim=1).tolist())
        self.attention = OwnTextAttention(Flux3AttnProcessor())

    def __call__(
        self, attn: nn.Module, x_BSD: torch.Tensor, mask: None, rope: tuple[torch.Tensor, ...]
    ) -> torch.Tensor:
        return self.attention(attn, x_BSD, mask, Places(*rope, self.length, self.lengths))


def whole(
    denoiser: Flux3Transformer2DModel,
    pipeline: Flux3Pipeline,
    features: dict,
    x_t: torch.Tensor,
    t_B: torch.Tensor,
) -> torch.Tensor:
    """With our attention where a batch adds something to a text, since the stock one sees it: its pipeline reads one
    prompt at a time, which tests/models/test_flux3.py compares with."""
    text_BLD, mask_BL = features["qwen3_vl"], features["qwen3_vl_mask"]
    for name, module in denoiser.named_modules():
        if hasattr(module, "set_processor"):
            reads_text = not name.startswith("mode_blocks.") and not mask_BL.all()
            module.set_processor(ToldOfText(text_BLD.shape[1], mask_BL) if reads_text else Flux3AttnProcessor())
    references, given = [latents for name, latents in features.items() if name.startswith("control")], {}
    if references:
        grids = [before_denoise._prepare_image_ids(*one.shape[2:], 0.5, -1 - n) for n, one in enumerate(references)]
        given["image_cond_hidden_states"] = torch.cat([packed(one) for one in references], dim=1)
        given["image_cond_ids"] = torch.cat(grids)
    (output_BTC,) = denoiser(
        hidden_states=packed(x_t),
        encoder_hidden_states=text_BLD,
        timestep=t_B,
        img_ids=before_denoise._prepare_image_ids(*x_t.shape[2:], 0.5),
        txt_ids=before_denoise.Flux3TextRoPEInputsStep._prepare_text_ids(text_BLD),
        return_dict=False,
        **given,
    )
    return rearrange(output_BTC, "b (h w) c -> b c h w", h=x_t.shape[2])


def prompt_features(stock: StockPipeline, captions: list[str]) -> list[dict[str, torch.Tensor]]:
    made = []
    for caption in captions:
        parts = stock.text_encoder, stock.tokenizer, caption
        encode = Flux3TextEncoderStep._get_qwen3_vl_prompt_embeds
        (text_LD,) = encode(*parts, max_sequence_length=TEXT_TOKENS)
        made.append({"qwen3_vl": text_LD, "qwen3_vl_mask": torch.ones(len(text_LD), dtype=torch.bool)})
    return made


def stock_latents(stock: StockPipeline, pixels_BCFHW: torch.Tensor) -> torch.Tensor:
    vae = stock.vae
    cells = Flux3VaeEncoderStep._patchify_latents(vae.encode(pixels_BCFHW[:, :, 0]).latent_dist.mode())
    mean, std = vae.bn.running_mean, torch.sqrt(vae.bn.running_var + vae.config.batch_norm_eps)
    return (cells - mean.view(1, -1, 1, 1)) / std.view(1, -1, 1, 1)


def draw(stock: StockPipeline, sampling: SamplingSettings, noise: torch.Tensor) -> torch.Tensor:
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
