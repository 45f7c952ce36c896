"""A whole tiny HiDream-I1 in diffusers' layout, with random weights and a Llama of its own; VAE, T5 and their words are
the miniature Flux's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, HiDreamImageTransformer2DModel
from diffusers import HiDreamImagePipeline as StockPipeline
from tokenizers import Tokenizer, models
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing
from transformers import (
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5EncoderModel,
)

from models.hidream import HiDreamOptions, HiDreamPipeline
from tests.models import tiny_flux
from tests.models.tiny_flux import MINI_FLUX
from tests.models.tiny_folder import drawn, randomised, write_index
from tests.models.tiny_sd3 import clip_config
from utils.diffusion.seeds import normal
from utils.settings.run_tables import SamplingSettings

STOCK = StockPipeline
SIZES = [(32, 48, 1), (64, 64, 1)]
"""One that is filled up, and a square."""
SAMPLING = {"width": 128, "height": 32, "guidance": 4.0, "negative_prompt": "blurred"}
TEXT_TOKENS, CLIP_L_WIDTH, CLIP_G_WIDTH, T5_WIDTH, LLAMA_WIDTH = 24, 16, 24, 64, 32
LLAMA_LAYERS, USED_LAYERS = 4, [0, 1, 3]
TRANSFORMER = {
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "num_single_layers": 3,
    "attention_head_dim": 8,
    "num_attention_heads": 4,
    "caption_channels": [T5_WIDTH, LLAMA_WIDTH],
    "text_emb_dim": CLIP_L_WIDTH + CLIP_G_WIDTH,
    "num_routed_experts": 4,
    "num_activated_experts": 2,
    "axes_dims_rope": (4, 2, 2),
    "max_resolution": (16, 16),
    "llama_layers": [0, 3, 1, 3, 3],
}
LLAMA = {
    "vocab_size": 300,
    "hidden_size": LLAMA_WIDTH,
    "intermediate_size": 64,
    "num_hidden_layers": LLAMA_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def tokenizer() -> PreTrainedTokenizerFast:
    """Every byte is a token; as Llama's, it begins texts with a token of its own and has none to fill up with."""
    letters = sorted(ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(letters)}, merges=[]))
    made.pre_tokenizer = ByteLevel(add_prefix_space=False)
    made.add_special_tokens(["<|begin_of_text|>", "<|eot_id|>"])
    begin = ("<|begin_of_text|>", made.token_to_id("<|begin_of_text|>"))
    made.post_processor = TemplateProcessing(single=f"{begin[0]} $A", special_tokens=[begin])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token=begin[0], eos_token="<|eot_id|>")


def write_llama(folder: Path, tokenizer_place: Path, **changes: Any) -> None:
    randomised(LlamaForCausalLM(LlamaConfig(**{**LLAMA, **changes})), 4).save_pretrained(folder)
    tokenizer().save_pretrained(tokenizer_place)


def write_folder(folder: Path, *, scheduler: Any = None, **changes: Any) -> Path:
    """`changes` are the transformer's."""
    torch.manual_seed(0)
    sources = {"vae": "vae", "text_encoder_3": "text_encoder_2", "tokenizer_3": "tokenizer_2"}
    sources |= {"tokenizer": "tokenizer", "tokenizer_2": "tokenizer"}
    for part, source in sources.items():
        (folder / part).symlink_to(MINI_FLUX / source)
    for number, (part, width) in enumerate({"text_encoder": CLIP_L_WIDTH, "text_encoder_2": CLIP_G_WIDTH}.items()):
        randomised(CLIPTextModelWithProjection(clip_config(width)), 2 + number).save_pretrained(folder / part)
    write_llama(folder / "text_encoder_4", folder / "tokenizer_4")
    transformer = randomised(HiDreamImageTransformer2DModel(**{**TRANSFORMER, **changes}), 1)
    transformer.save_pretrained(folder / "transformer")
    scheduler = scheduler or FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.save_pretrained(folder / "scheduler")
    parts = {
        "scheduler": type(scheduler),
        "text_encoder": CLIPTextModelWithProjection,
        "text_encoder_2": CLIPTextModelWithProjection,
        "text_encoder_3": T5EncoderModel,
        "text_encoder_4": LlamaForCausalLM,
        "tokenizer": CLIPTokenizer,
        "tokenizer_2": CLIPTokenizer,
        "tokenizer_3": PreTrainedTokenizerFast,
        "tokenizer_4": PreTrainedTokenizerFast,
        "transformer": HiDreamImageTransformer2DModel,
        "vae": AutoencoderKL,
    }
    write_index(folder, STOCK, parts)
    return folder


def pipeline(folder: Path, **options: Any) -> HiDreamPipeline:
    options = {"dtype": "float32", "max_sequence_length": TEXT_TOKENS, **options}
    return HiDreamPipeline(HiDreamOptions(type="hidream", diffusers_path=folder, **options), seed=0)


def features(lengths: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Random text features; they have all the same number of tokens."""
    shapes = {
        "clip_l_pooled": (CLIP_L_WIDTH,),
        "clip_g_pooled": (CLIP_G_WIDTH,),
        "t5": (TEXT_TOKENS, T5_WIDTH),
        "llama3": (len(USED_LAYERS), TEXT_TOKENS, LLAMA_WIDTH),
    }
    return {name: normal((len(lengths), *shape), 0, name, *lengths) for name, shape in shapes.items()}


def whole(
    denoiser: HiDreamImageTransformer2DModel,
    pipeline: HiDreamPipeline,
    features: dict,
    x_t: torch.Tensor,
    t_B: torch.Tensor,
) -> torch.Tensor:
    return denoiser(hidden_states=x_t, timesteps=t_B * 1000, **texts(features), return_dict=False)[0]


def texts(features: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What the stock module takes of text."""
    # Layers that no block reads are of no consequence.
    states = [torch.full_like(features["llama3"][:, 0], torch.nan)] * LLAMA_LAYERS
    for folder, layer in enumerate(USED_LAYERS):
        states[layer] = features["llama3"][:, folder]
    return {
        "encoder_hidden_states_t5": features["t5"],
        "encoder_hidden_states_llama3": torch.stack(states),
        "pooled_embeds": torch.cat([features["clip_l_pooled"], features["clip_g_pooled"]], dim=1),
    }


def prompt_features(stock: StockPipeline, captions: list[str]) -> list[dict[str, torch.Tensor]]:
    t5_BLD, _, llama_NBLD, _, pooled_BP, _ = stock.encode_prompt(
        captions, do_classifier_free_guidance=False, max_sequence_length=TEXT_TOKENS
    )
    clip_l_BP, clip_g_BP = pooled_BP.split([CLIP_L_WIDTH, CLIP_G_WIDTH], dim=1)
    made = {"clip_l_pooled": clip_l_BP, "clip_g_pooled": clip_g_BP, "t5": t5_BLD}
    made["llama3"] = llama_NBLD[USED_LAYERS].transpose(0, 1)
    return [{name: feature[number] for name, feature in made.items()} for number in range(len(captions))]


stock_latents = tiny_flux.stock_latents


def draw(stock: StockPipeline, sampling: SamplingSettings, noise: torch.Tensor) -> torch.Tensor:
    # It changes the size of what it draws until it has this area.
    stock.default_sample_size = round((sampling.width * sampling.height) ** 0.5) // stock.vae_scale_factor
    return drawn(stock, sampling, noise, max_sequence_length=TEXT_TOKENS).images
