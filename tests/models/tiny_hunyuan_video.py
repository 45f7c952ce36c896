"""A whole tiny HunyuanVideo in diffusers' layout, with random weights and a Llama of its own; CLIP is the miniature
Flux's."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLHunyuanVideo, FlowMatchEulerDiscreteScheduler, HunyuanVideoTransformer3DModel
from diffusers import HunyuanVideoPipeline as StockPipeline
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
from tokenizers import Tokenizer, models
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing
from transformers import CLIPTextModel, CLIPTokenizer, LlamaConfig, LlamaModel, PreTrainedTokenizerFast

from models.hunyuan_video import HunyuanVideoOptions, HunyuanVideoPipeline
from tests.models.tiny_flux import MINI_FLUX
from tests.models.tiny_folder import drawn, of_true_length, ragged, randomised, write_index
from utils.diffusion.seeds import normal
from utils.settings.run_tables import SamplingSettings

STOCK = StockPipeline
SIZES = [(48, 32, 1), (32, 64, 9)]
"""A still and a clip."""
SAMPLING = {"width": 48, "height": 32, "frames": 9, "guidance": 6.0}
TEXT_TOKENS, TEXT_WIDTH, POOLED, CHANNELS = 40, 16, 32, 4
TRANSFORMER = {
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_layers": 4,
    "num_single_layers": 2,
    "num_refiner_layers": 2,
    "text_embed_dim": TEXT_WIDTH,
    "pooled_projection_dim": POOLED,
    "rope_axes_dim": (4, 4, 8),
}
VAE = {
    "latent_channels": CHANNELS,
    "block_out_channels": (8, 8, 8, 8),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "scaling_factor": 0.47,
}
LLAMA = {
    "vocab_size": 400,
    "hidden_size": TEXT_WIDTH,
    "intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
MARKS = ("<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<pad>")


def tokenizer(template: str = DEFAULT_PROMPT_TEMPLATE["template"], further: tuple[str, ...] = ()) -> Any:
    """Every byte is a token, and so are marks and the words of the template, which takes one token more than
    that of the real one. As Llama's, it begins texts with a token of its own."""
    letters = sorted(ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(letters)}, merges=[]))
    made.pre_tokenizer = ByteLevel(add_prefix_space=False)
    words = set(re.findall(r"\n\n| ?\w+ ?", re.sub(r"<[^>]*>|{}", "", template))) - {"theme "}
    made.add_special_tokens([*MARKS, *further])
    made.add_tokens(sorted(words))
    begin = (MARKS[0], made.token_to_id(MARKS[0]))
    made.post_processor = TemplateProcessing(single=f"{begin[0]} $A", special_tokens=[begin])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token=MARKS[0], eos_token=MARKS[1], pad_token=MARKS[-1])


def write_parts(folder: Path, **changes: Any) -> dict[str, type]:
    """All but the encoder that reads the prompt; `changes` are the transformer's. Returns their classes."""
    torch.manual_seed(0)
    for part, source in {"text_encoder_2": "text_encoder", "tokenizer_2": "tokenizer"}.items():
        (folder / part).symlink_to(MINI_FLUX / source)
    transformer = HunyuanVideoTransformer3DModel(**{**TRANSFORMER, **changes})
    randomised(transformer, 1).save_pretrained(folder / "transformer")
    randomised(AutoencoderKLHunyuanVideo(**VAE), 2).save_pretrained(folder / "vae")
    FlowMatchEulerDiscreteScheduler(shift=7.0).save_pretrained(folder / "scheduler")
    return {
        "text_encoder_2": CLIPTextModel,
        "tokenizer": PreTrainedTokenizerFast,
        "tokenizer_2": CLIPTokenizer,
        "transformer": HunyuanVideoTransformer3DModel,
        "vae": AutoencoderKLHunyuanVideo,
        "scheduler": FlowMatchEulerDiscreteScheduler,
    }


def write_folder(folder: Path, **changes: Any) -> Path:
    """`changes` are the transformer's."""
    parts = write_parts(folder, **changes)
    tokenizer().save_pretrained(folder / "tokenizer")
    randomised(LlamaModel(LlamaConfig(**LLAMA)), 3).save_pretrained(folder / "text_encoder")
    write_index(folder, STOCK, {"text_encoder": LlamaModel, **parts})
    return folder


def pipeline(folder: Path, **options: Any) -> HunyuanVideoPipeline:
    options = {"dtype": "float32", "max_sequence_length": TEXT_TOKENS, **options}
    return HunyuanVideoPipeline(HunyuanVideoOptions(type="hunyuan_video", diffusers_path=folder, **options), seed=0)


def features(lengths: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Random text features of these many tokens each."""
    return {**ragged("llama", lengths, TEXT_WIDTH), "clip_pooled": normal((len(lengths), POOLED), 0, "pooled")}


def whole(
    denoiser: HunyuanVideoTransformer3DModel,
    pipeline: HunyuanVideoPipeline,
    features: dict,
    x_t: torch.Tensor,
    t_B: torch.Tensor,
) -> torch.Tensor:
    return denoiser(
        hidden_states=x_t,
        timestep=t_B * 1000,
        encoder_hidden_states=features["llama"],
        encoder_attention_mask=features["llama_mask"],
        pooled_projections=features["clip_pooled"],
        guidance=torch.full((len(x_t),), 1000.0) if denoiser.config.guidance_embeds else None,
        return_dict=False,
    )[0]


def prompt_features(stock: StockPipeline, captions: list[str]) -> list[dict[str, torch.Tensor]]:
    text_BLD, pooled_BD, mask_BL = stock.encode_prompt(captions, max_sequence_length=TEXT_TOKENS, device="cpu")
    texts = of_true_length("llama", text_BLD, mask_BL.sum(1).tolist())
    return [{**text, "clip_pooled": pooled} for text, pooled in zip(texts, pooled_BD, strict=True)]


def stock_latents(stock: StockPipeline, pixels_BCFHW: torch.Tensor) -> torch.Tensor:
    return stock.vae.encode(pixels_BCFHW).latent_dist.mode() * stock.vae.config.scaling_factor


def draw(stock: StockPipeline, sampling: SamplingSettings, noise: torch.Tensor) -> torch.Tensor:
    keys = {"num_frames": sampling.frames, "max_sequence_length": TEXT_TOKENS}
    return drawn(stock, sampling, noise, **keys).frames
