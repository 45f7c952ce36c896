"""A whole tiny Cosmos-Predict2.5 in diffusers' layout; Qwen2.5-VL is the tiny Qwen-Image's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLWan,
    Cosmos2_5_PredictBasePipeline,
    CosmosTransformer3DModel,
    UniPCMultistepScheduler,
)
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

from models.cosmos_predict25 import CosmosPredict25Options, CosmosPredict25Pipeline
from tests.models import tiny_cosmos_predict2, tiny_qwen_image, tiny_wan
from tests.models.tiny_cosmos_predict2 import CHANNELS, NothingToJudge
from tests.models.tiny_folder import drawn, randomised, write_index
from utils.diffusion.seeds import normal
from utils.settings.run_tables import SamplingSettings


class StockPipeline(Cosmos2_5_PredictBasePipeline):
    """Without the guardrail's package."""

    def __init__(
        self, text_encoder: Any, tokenizer: Any, transformer: Any, vae: Any, scheduler: Any, safety_checker: Any = None
    ):
        super().__init__(text_encoder, tokenizer, transformer, vae, scheduler, safety_checker or NothingToJudge())


STOCK = StockPipeline
SIZES = [(48, 32, 1), (32, 64, 5)]
"""A still and a clip."""
SAMPLING = {"width": 48, "height": 32, "frames": 5, "guidance": 4.0, "negative_prompt": "blurred"}
TEXT_TOKENS, LAYERS, WIDTH = 96, 2, tiny_qwen_image.TEXT_WIDTH
TRANSFORMER = {
    **tiny_cosmos_predict2.TRANSFORMER,
    "in_channels": CHANNELS + 1,
    "attention_head_dim": 30,
    "rope_scale": (1.0, 3.0, 3.0),
    "text_embed_dim": 20,
    "use_crossattn_projection": True,
    "crossattn_proj_in_channels": LAYERS * WIDTH,
    "encoder_hidden_states_channels": 20,
}
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% for part in message['content'] %}"
    "{{ part['text'] }}{% endfor %}<|im_end|>\n{% endfor %}"
)


def tokenizer() -> Qwen2Tokenizer:
    """That of the tiny Qwen-Image, with the model's chat template, of which some words are tokens."""
    made = tiny_qwen_image.tokenizer()
    made.add_tokens(["You are a helpful assistant who will provide prompts", "image generator"])
    made.chat_template = CHAT_TEMPLATE
    return made


def write_folder(folder: Path, **changes: Any) -> Path:
    """`changes` are the transformer's."""
    torch.manual_seed(0)
    randomised(CosmosTransformer3DModel(**{**TRANSFORMER, **changes}), 1).save_pretrained(folder / "transformer")
    randomised(AutoencoderKLWan(**tiny_wan.VAE), 2).save_pretrained(folder / "vae")
    tokenizer().save_pretrained(folder / "tokenizer")
    tiny_qwen_image.text_encoder(LAYERS).save_pretrained(folder / "text_encoder")
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
    karras = {"use_karras_sigmas": True, "sigma_max": 200.0, "sigma_min": 0.01}
    UniPCMultistepScheduler(**flow, **karras).save_pretrained(folder / "scheduler")
    parts = {
        "text_encoder": Qwen2_5_VLForConditionalGeneration,
        "tokenizer": Qwen2Tokenizer,
        "transformer": CosmosTransformer3DModel,
        "vae": AutoencoderKLWan,
        "scheduler": UniPCMultistepScheduler,
    }
    write_index(folder, Cosmos2_5_PredictBasePipeline, parts)
    return folder


def pipeline(folder: Path, **options: Any) -> CosmosPredict25Pipeline:
    options = {"dtype": "float32", "max_sequence_length": TEXT_TOKENS, **options}
    return CosmosPredict25Pipeline(CosmosPredict25Options(type="cosmos_predict25", diffusers_path=folder, **options))


def features(lengths: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Random text features: all have the full length."""
    return {"qwen2_5_vl": normal((len(lengths), TEXT_TOKENS, LAYERS * WIDTH), 0, "text")}


def whole(
    denoiser: CosmosTransformer3DModel,
    pipeline: CosmosPredict25Pipeline,
    features: dict,
    x_t: torch.Tensor,
    t_B: torch.Tensor,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    height, width = (side * 8 for side in x_t.shape[3:])
    return denoiser(
        hidden_states=x_t,
        condition_mask=torch.zeros_like(x_t[:, :1]) if mask is None else mask,
        timestep=t_B,
        encoder_hidden_states=features["qwen2_5_vl"],
        padding_mask=torch.zeros(1, 1, height, width),
        return_dict=False,
    )[0]


def prompt_features(stock: StockPipeline, captions: list[str]) -> list[dict[str, torch.Tensor]]:
    text_BLD, _ = stock.encode_prompt(captions, None, False, max_sequence_length=TEXT_TOKENS, device="cpu")
    return [{"qwen2_5_vl": text_LD} for text_LD in text_BLD]


stock_latents = tiny_wan.stock_latents


def draw(stock: StockPipeline, sampling: SamplingSettings, noise: torch.Tensor) -> torch.Tensor:
    return drawn(stock, sampling, noise, num_frames=sampling.frames, max_sequence_length=TEXT_TOKENS).frames
