"""A whole tiny Qwen-Image in diffusers' layout, with random weights; of an Edit model, with what reads its pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLQwenImage, FlowMatchEulerDiscreteScheduler, QwenImageTransformer2DModel
from diffusers import QwenImagePipeline as StockPipeline
from einops import rearrange
from tokenizers.pre_tokenizers import ByteLevel
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from models.qwen_image import QwenImageOptions, QwenImagePipeline
from tests.models.tiny_folder import drawn, ragged, randomised, write_index
from utils.settings.run_tables import SamplingSettings

STOCK = StockPipeline
SAMPLING = {"width": 96, "height": 64, "guidance": 3.0, "negative_prompt": "blurred"}
TEXT_TOKENS, TEXT_WIDTH, CHANNELS = 256, 16, 4
"""With a byte a token, the template takes 196 after those that are skipped."""
TRANSFORMER = {
    "patch_size": 2,
    "in_channels": 4 * CHANNELS,
    "out_channels": CHANNELS,
    "num_layers": 3,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": TEXT_WIDTH,
    "axes_dims_rope": (4, 6, 6),
}
VAE = {
    "base_dim": 4,
    "z_dim": CHANNELS,
    "dim_mult": [1, 1, 1, 1],
    "num_res_blocks": 1,
    "temperal_downsample": [False, True, True],
    "latents_mean": [0.1, -0.2, 0.3, 0.0],
    "latents_std": [1.5, 0.7, 1.0, 2.0],
}
SCHEDULER = {
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 0.9,
    "max_image_seq_len": 8192,
    "shift_terminal": 0.02,
    "time_shift_type": "exponential",
}
MARKS = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")


def tokenizer() -> Qwen2Tokenizer:
    """Every byte is a token, and so is each mark."""
    letters = sorted(ByteLevel.alphabet())
    made = Qwen2Tokenizer(vocab={letter: number for number, letter in enumerate(letters)}, merges=[])
    made.add_special_tokens({"additional_special_tokens": list(MARKS)})
    return made


def text_encoder(layers: int = 2, vocabulary: int = 300) -> Qwen2_5_VLForConditionalGeneration:
    number = tokenizer().convert_tokens_to_ids
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": vocabulary,
            "hidden_size": TEXT_WIDTH,
            "intermediate_size": 32,
            "num_hidden_layers": layers,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "bos_token_id": 0,
            "eos_token_id": 0,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
        },
        vision_config={
            "depth": 2,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": TEXT_WIDTH,
            "fullatt_block_indexes": [1],
        },
        image_token_id=number("<|image_pad|>"),
        video_token_id=number("<|video_pad|>"),
        vision_start_token_id=number("<|vision_start|>"),
        vision_end_token_id=number("<|vision_end|>"),
    )
    return randomised(Qwen2_5_VLForConditionalGeneration(config), 3)


def write_folder(folder: Path, stock: type = STOCK, **changes: Any) -> Path:
    """The folder of one of the stock pipelines."""
    torch.manual_seed(0)
    tokenizer().save_pretrained(folder / "tokenizer")
    randomised(QwenImageTransformer2DModel(**{**TRANSFORMER, **changes}), 1).save_pretrained(folder / "transformer")
    randomised(AutoencoderKLQwenImage(**VAE), 2).save_pretrained(folder / "vae")
    text_encoder().save_pretrained(folder / "text_encoder")
    FlowMatchEulerDiscreteScheduler(**SCHEDULER).save_pretrained(folder / "scheduler")
    parts = {
        "scheduler": FlowMatchEulerDiscreteScheduler,
        "text_encoder": Qwen2_5_VLForConditionalGeneration,
        "tokenizer": Qwen2Tokenizer,
        "transformer": QwenImageTransformer2DModel,
        "vae": AutoencoderKLQwenImage,
    }
    if stock is not STOCK:
        Qwen2VLImageProcessorPil(min_pixels=3136, max_pixels=12845056).save_pretrained(folder / "processor")
    write_index(folder, stock, parts)
    return folder


def pipeline(folder: Path, **options: Any) -> QwenImagePipeline:
    options = {"dtype": "float32", "max_sequence_length": TEXT_TOKENS, **options}
    return QwenImagePipeline(QwenImageOptions(type="qwen_image", diffusers_path=folder, **options), seed=0)


def features(lengths: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Random text features of these many tokens each."""
    return ragged("qwen2_5_vl", lengths, TEXT_WIDTH)


def whole(
    denoiser: QwenImageTransformer2DModel, pipeline: QwenImagePipeline, features: dict, x_t: torch.Tensor, t_B: Any
) -> torch.Tensor:
    """With control images as the Edit pipelines have them: further tokens, whose predictions are left out."""
    pictures = [x_t, *(latents for name, latents in features.items() if name.startswith("control"))]
    shapes = [(1, picture.shape[3] // 2, picture.shape[4] // 2) for picture in pictures]
    tokens = [StockPipeline._pack_latents(picture, len(picture), CHANNELS, *picture.shape[3:]) for picture in pictures]
    mask_BL = features["qwen2_5_vl_mask"]
    (output_BTC,) = denoiser(
        hidden_states=torch.cat(tokens, dim=1),
        timestep=t_B,
        encoder_hidden_states=features["qwen2_5_vl"],
        encoder_hidden_states_mask=None if mask_BL.all() else mask_BL,
        img_shapes=[shapes] * len(x_t),
        return_dict=False,
    )
    height, width = x_t.shape[3:]
    return StockPipeline._unpack_latents(output_BTC[:, : tokens[0].shape[1]], height * 8, width * 8, 8)


def prompt_features(stock: StockPipeline, captions: list[str]) -> list[dict[str, torch.Tensor]]:
    made = []
    for caption in captions:
        # One at a time: alone a caption has no padding, and no mask.
        (text_LD,), _ = stock.encode_prompt([caption], "cpu", max_sequence_length=TEXT_TOKENS)
        made.append({"qwen2_5_vl": text_LD, "qwen2_5_vl_mask": torch.ones(len(text_LD), dtype=torch.bool)})
    return made


def stock_latents(stock: Any, pixels_BCFHW: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(VAE[name]).view(-1, 1, 1, 1) for name in ("latents_mean", "latents_std"))
    return (stock.vae.encode(pixels_BCFHW).latent_dist.mode() - mean) / std


def draw(stock: Any, sampling: SamplingSettings, noise: torch.Tensor) -> torch.Tensor:
    tokens_BTC = rearrange(noise, "b c 1 (h p) (w q) -> b (h w) (c p q)", p=2, q=2)
    # What it calls the scale of guidance is an input that no model has.
    keys = {"true_cfg_scale": sampling.guidance, "guidance_scale": None, "max_sequence_length": TEXT_TOKENS}
    tokens_BTC = drawn(stock, sampling, tokens_BTC, **keys).images
    return stock._unpack_latents(tokens_BTC, sampling.height, sampling.width, 8)
