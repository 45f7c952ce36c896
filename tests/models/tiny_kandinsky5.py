"""A whole tiny Kandinsky 5 of text to video in diffusers' layout, with random weights; CLIP is the miniature Flux's,
the VAE the tiny HunyuanVideo's."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLHunyuanVideo, FlowMatchEulerDiscreteScheduler, Kandinsky5Transformer3DModel
from diffusers import Kandinsky5T2VPipeline as StockPipeline
from einops import rearrange
from transformers import CLIPTextModel, CLIPTokenizer, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

from models.foundation.encoders.kandinsky_prompts import OF_A_PICTURE, OF_A_VIDEO
from models.foundation.layers.kandinsky import OfTexts, OwnTextAttention
from models.kandinsky5 import Kandinsky5Options, Kandinsky5Pipeline
from tests.models import tiny_hunyuan_video, tiny_qwen_image
from tests.models.tiny_flux import MINI_FLUX
from tests.models.tiny_folder import drawn, ragged, randomised, write_index
from utils.diffusion.seeds import normal
from utils.settings.run_tables import SamplingSettings

STOCK = StockPipeline
SIZES = [(48, 32, 1), (32, 64, 5)]
"""A still and a clip."""
SAMPLING = {"width": 48, "height": 32, "frames": 5, "guidance": 3.0, "negative_prompt": "blurred"}
TEXT_TOKENS, TEXT_WIDTH, POOLED = 40, tiny_qwen_image.TEXT_WIDTH, tiny_hunyuan_video.POOLED
CHANNELS = tiny_hunyuan_video.CHANNELS
TRANSFORMER = {
    "in_visual_dim": CHANNELS,
    "out_visual_dim": CHANNELS,
    "in_text_dim": TEXT_WIDTH,
    "in_text_dim2": POOLED,
    "time_dim": 8,
    "patch_size": (1, 2, 2),
    "model_dim": 32,
    "ff_dim": 48,
    "num_text_blocks": 2,
    "num_visual_blocks": 2,
    "axes_dims": (4, 6, 6),
    "visual_cond": True,
}


def tokenizer() -> Qwen2Tokenizer:
    """Every byte is a token, and so are marks and the words of the templates."""
    made = tiny_qwen_image.tokenizer()
    templates = " ".join(re.sub(r"<[^>]*>|{}", "", template) for template in (OF_A_VIDEO, OF_A_PICTURE))
    made.add_tokens(sorted(set(re.findall(r"\n| ?\w+", templates))))
    return made


def write_parts(folder: Path, stock: type, vae: type, shift: float, **changes: Any) -> Path:
    """All parts but the VAE; `changes` are the transformer's."""
    torch.manual_seed(0)
    transformer = Kandinsky5Transformer3DModel(**{**TRANSFORMER, **changes})
    randomised(transformer, 1).save_pretrained(folder / "transformer")
    words = tokenizer()
    words.save_pretrained(folder / "tokenizer")
    tiny_qwen_image.text_encoder(vocabulary=len(words)).save_pretrained(folder / "text_encoder")
    for part, source in {"text_encoder_2": "text_encoder", "tokenizer_2": "tokenizer"}.items():
        (folder / part).symlink_to(MINI_FLUX / source)
    FlowMatchEulerDiscreteScheduler(shift=shift).save_pretrained(folder / "scheduler")
    parts = {
        "scheduler": FlowMatchEulerDiscreteScheduler,
        "text_encoder": Qwen2_5_VLForConditionalGeneration,
        "text_encoder_2": CLIPTextModel,
        "tokenizer": Qwen2Tokenizer,
        "tokenizer_2": CLIPTokenizer,
        "transformer": Kandinsky5Transformer3DModel,
        "vae": vae,
    }
    write_index(folder, stock, parts)
    return folder


def write_folder(folder: Path, stock: type = STOCK, **changes: Any) -> Path:
    """`changes` are the transformer's."""
    torch.manual_seed(0)
    randomised(AutoencoderKLHunyuanVideo(**tiny_hunyuan_video.VAE), 2).save_pretrained(folder / "vae")
    return write_parts(folder, stock, AutoencoderKLHunyuanVideo, 10.0, **changes)


def pipeline(folder: Path, **options: Any) -> Kandinsky5Pipeline:
    options = {"dtype": "float32", "max_sequence_length": TEXT_TOKENS, **options}
    return Kandinsky5Pipeline(Kandinsky5Options(type="kandinsky5", diffusers_path=folder, **options), seed=0)


def features(lengths: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Random text features of these many tokens each."""
    return {**ragged("qwen2_5_vl", lengths, TEXT_WIDTH), "clip_pooled": normal((len(lengths), POOLED), 0, "pooled")}


class Told(OwnTextAttention):
    """Our attention in the stock module, which hands on tensors alone."""

    def __init__(self, stock: Any, lengths: tuple[torch.Tensor, ...] | None):
        super().__init__(stock)
        self.lengths = lengths

    def __call__(
        self, attn: Any, x: torch.Tensor, encoder_hidden_states: Any = None, rotary_emb: Any = None, **further: Any
    ) -> torch.Tensor:
        told = (
            value if value is None else OfTexts(value, self.lengths) for value in (encoder_hidden_states, rotary_emb)
        )
        return super().__call__(attn, x, *told)


def of_own_texts(denoiser: Kandinsky5Transformer3DModel, lengths: Any) -> Kandinsky5Transformer3DModel:
    """The denoiser, whose blocks see these many tokens of each text; None for all."""
    attentions = [block.cross_attention for block in denoiser.visual_transformer_blocks]
    for attention in [*attentions, *(block.self_attention for block in denoiser.text_transformer_blocks)]:
        attention.set_processor(Told(getattr(attention.processor, "stock", attention.processor), lengths))
    return denoiser


def whole(
    denoiser: Kandinsky5Transformer3DModel,
    pipeline: Kandinsky5Pipeline,
    features: dict,
    x_t: torch.Tensor,
    t_B: torch.Tensor,
    scale: tuple[float, ...] = (1, 3.16, 3.16),
) -> torch.Tensor:
    """With our attention, since the stock one sees the padding of a batch."""
    x_BfhwC = rearrange(x_t, "b c f h w -> b f h w c").contiguous()
    if denoiser.visual_cond:
        x_BfhwC = torch.cat([x_BfhwC, torch.zeros_like(x_BfhwC), torch.zeros_like(x_BfhwC[..., :1])], dim=-1)
    return predicted(denoiser, features, x_BfhwC, t_B, scale)


def predicted(
    denoiser: Kandinsky5Transformer3DModel,
    features: dict,
    x_BfhwC: torch.Tensor,
    t_B: torch.Tensor,
    scale: tuple[float, ...],
) -> torch.Tensor:
    """What the stock module gives for the latents that it takes, as (B, C, f, h, w)."""
    mask_BL, (frames, height, width) = features["qwen2_5_vl_mask"], x_BfhwC.shape[1:4]
    lengths = tuple(torch.empty(int(length), 0) for length in mask_BL.sum(1))
    (output_BfhwC,) = of_own_texts(denoiser, None if mask_BL.all() else lengths)(
        hidden_states=x_BfhwC,
        encoder_hidden_states=features["qwen2_5_vl"],
        pooled_projections=features["clip_pooled"],
        timestep=t_B * 1000,
        visual_rope_pos=[torch.arange(side) for side in (frames, height // 2, width // 2)],
        text_rope_pos=torch.arange(mask_BL.shape[1]),
        scale_factor=scale,
        return_dict=True,
    ).values()
    return rearrange(output_BfhwC, "b f h w c -> b c f h w")


def prompt_features(stock: Any, captions: list[str]) -> list[dict[str, torch.Tensor]]:
    """One after the other: the stock pipeline lets a caption see the padding of its batch."""
    made = []
    for caption in captions:
        (text_LD,), (pooled,), _ = stock.encode_prompt([caption], max_sequence_length=TEXT_TOKENS, device="cpu")
        mask = torch.ones(len(text_LD), dtype=torch.bool)
        made.append({"qwen2_5_vl": text_LD, "qwen2_5_vl_mask": mask, "clip_pooled": pooled})
    return made


stock_latents = tiny_hunyuan_video.stock_latents


def draw(stock: StockPipeline, sampling: SamplingSettings, noise: torch.Tensor) -> torch.Tensor:
    # It draws its noise with the channels innermost, and is not given the channels of a condition.
    channels, *grid = noise.shape[1:]
    x_BfhwC = noise.reshape(1, *grid, channels)
    x_BfhwC = torch.cat([x_BfhwC, torch.zeros_like(x_BfhwC), torch.zeros_like(x_BfhwC[..., :1])], dim=-1)
    keys = {"num_frames": sampling.frames, "max_sequence_length": TEXT_TOKENS}
    return rearrange(drawn(stock, sampling, x_BfhwC, **keys).frames, "b f h w c -> b c f h w")
