"""A whole tiny LTX-2 in diffusers' layout, with random weights, sound included."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLLTX2Audio,
    AutoencoderKLLTX2Video,
    FlowMatchEulerDiscreteScheduler,
    LTX2VideoTransformer3DModel,
)
from diffusers import LTX2Pipeline as StockPipeline
from diffusers.pipelines.ltx2 import LTX2TextConnectors, LTX2Vocoder
from torch import nn
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, GemmaTokenizer

from models.ltx2 import LTX2Options, LTX2Pipeline
from tests.models.tiny_folder import drawn, randomised, write_index
from tests.models.tiny_lumina2 import TEXT, tokenizer
from utils.diffusion.seeds import normal
from utils.settings.run_tables import SamplingSettings

STOCK = StockPipeline
SIZES = [(48, 32, 1), (32, 64, 5)]
"""A still and a clip."""
SAMPLING = {"width": 64, "height": 32, "frames": 5, "guidance": 3.0, "negative_prompt": "blurred"}
TEXT_TOKENS, TEXT_WIDTH, CHANNELS, FPS, SOUND = 32, 16, 4, 24, 4
STATES = TEXT["num_hidden_layers"] + 1
TRANSFORMER = {
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "num_attention_heads": 2,
    "attention_head_dim": 14,
    "cross_attention_dim": 28,
    "vae_scale_factors": (2, 8, 8),
    "audio_in_channels": SOUND,
    "audio_out_channels": SOUND,
    "audio_num_attention_heads": 2,
    "audio_attention_head_dim": 6,
    "audio_cross_attention_dim": 12,
    "num_layers": 3,
    "caption_channels": TEXT_WIDTH,
    "rope_type": "split",
}
CONNECTORS = {
    "caption_channels": TEXT_WIDTH,
    "text_proj_in_factor": STATES,
    **{
        f"{stream}_connector_{key}": value
        for stream in ("video", "audio")
        for key, value in {
            "num_attention_heads": 2,
            "attention_head_dim": TEXT_WIDTH // 2,
            "num_layers": 1,
            "num_learnable_registers": 8,
        }.items()
    },
}
VAE = {
    "latent_channels": CHANNELS,
    "block_out_channels": (8, 8),
    "down_block_types": ("LTX2VideoDownBlock3D",) * 2,
    "decoder_block_out_channels": (8, 8),
    "layers_per_block": (1, 1, 1),
    "decoder_layers_per_block": (1, 1, 1),
    "spatio_temporal_scaling": (True, False),
    "decoder_spatio_temporal_scaling": (True, False),
    "decoder_inject_noise": (False, False, False),
    "downsample_type": ("spatiotemporal", "spatiotemporal"),
    "upsample_type": ("spatiotemporal", "spatiotemporal"),
    "upsample_residual": (False, False),
    "upsample_factor": (1, 1),
    "decoder_causal": False,
    "scaling_factor": 0.8,
}
AUDIO_VAE = {"base_channels": 4, "ch_mult": (1,), "num_res_blocks": 1, "latent_channels": SOUND, "mel_bins": 4}
VOCODER = {
    "in_channels": 4,
    "hidden_channels": 4,
    "upsample_kernel_sizes": [4],
    "upsample_factors": [2],
    "resnet_kernel_sizes": [3],
    "resnet_dilations": [[1]],
}
SHIFT = {"base_image_seq_len": 1024, "max_image_seq_len": 4096, "base_shift": 0.95, "max_shift": 2.05}
VISION = {
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "image_size": 8,
    "patch_size": 4,
}


def gemma() -> Gemma3ForConditionalGeneration:
    config = Gemma3Config(text_config=TEXT, vision_config=VISION, mm_tokens_per_image=4)
    return randomised(Gemma3ForConditionalGeneration(config), 3)


def write_folder(folder: Path, connectors: dict[str, Any] | None = None, **changes: Any) -> Path:
    """`changes` are the transformer's."""
    torch.manual_seed(0)
    tokenizer().save_pretrained(folder / "tokenizer")
    gemma().save_pretrained(folder / "text_encoder")
    made = LTX2TextConnectors(**{**CONNECTORS, **(connectors or {})})
    randomised(made, 4).save_pretrained(folder / "connectors")
    randomised(LTX2VideoTransformer3DModel(**{**TRANSFORMER, **changes}), 1).save_pretrained(folder / "transformer")
    autoencoder = randomised(AutoencoderKLLTX2Video(**VAE), 2)
    autoencoder.latents_mean.copy_(torch.tensor([0.1, -0.2, 0.3, 0.0]))
    autoencoder.latents_std.copy_(torch.tensor([1.5, 0.7, 1.0, 2.0]))
    autoencoder.save_pretrained(folder / "vae")
    AutoencoderKLLTX2Audio(**AUDIO_VAE).save_pretrained(folder / "audio_vae")
    LTX2Vocoder(**VOCODER).save_pretrained(folder / "vocoder")
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.1, **SHIFT)
    scheduler.save_pretrained(folder / "scheduler")
    parts = {
        "scheduler": FlowMatchEulerDiscreteScheduler,
        "vae": AutoencoderKLLTX2Video,
        "audio_vae": AutoencoderKLLTX2Audio,
        "text_encoder": Gemma3ForConditionalGeneration,
        "tokenizer": GemmaTokenizer,
        "transformer": LTX2VideoTransformer3DModel,
    }
    # Classes of the pipeline's own.
    own = {"connectors": ["ltx2", "LTX2TextConnectors"], "vocoder": ["ltx2", "LTX2Vocoder"]}
    write_index(folder, STOCK, parts, **own)
    return folder


def pipeline(folder: Path, **options: Any) -> LTX2Pipeline:
    options = {"dtype": "float32", "max_sequence_length": TEXT_TOKENS, **options}
    return LTX2Pipeline(LTX2Options(type="ltx2", diffusers_path=folder, **options), seed=0)


def features(lengths: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Random text features, which are of one length for all texts."""
    return {"gemma3": torch.stack([normal((TEXT_TOKENS, TEXT_WIDTH), 0, "text", length) for length in lengths])}


@contextmanager
def with_sound(denoiser: LTX2VideoTransformer3DModel) -> Iterator[None]:
    """A context in which ours, which lacks what belongs to sound, has random modules for it."""
    whole = randomised(LTX2VideoTransformer3DModel.from_config(denoiser.config), 5)
    added: list[tuple[nn.Module, str]] = []
    pairs = zip(denoiser.transformer_blocks, whole.transformer_blocks, strict=True)
    for ours, theirs in ((denoiser, whole), *pairs):
        for name, part in [*theirs.named_children(), *theirs.named_parameters(recurse=False)]:
            if not hasattr(ours, name):
                setattr(ours, name, part)
                added.append((ours, name))
    try:
        yield
    finally:
        for ours, name in added:
            delattr(ours, name)


def whole(
    denoiser: LTX2VideoTransformer3DModel,
    pipeline: LTX2Pipeline,
    features: dict,
    x_t: torch.Tensor,
    t_B: torch.Tensor,
    level_B: torch.Tensor | None = None,
) -> torch.Tensor:
    """With isolated streams. `t_B` may have a time for each token (B, T) beside the noise level of the sample."""
    frames, height, width = x_t.shape[2:]
    level_B, text_BLD = t_B if level_B is None else level_B, features["gemma3"]
    sound = denoiser.config.audio_cross_attention_dim
    projects = denoiser.config.use_prompt_embeddings
    with with_sound(denoiser):
        output_BTC, _ = denoiser(
            hidden_states=StockPipeline._pack_latents(x_t),
            audio_hidden_states=normal((len(x_t), 3, SOUND), 0, "sound"),
            encoder_hidden_states=text_BLD,
            audio_encoder_hidden_states=text_BLD if projects else text_BLD[..., :sound],
            timestep=t_B * 1000,
            audio_timestep=level_B * 1000,
            sigma=level_B * 1000,
            num_frames=frames,
            height=height,
            width=width,
            fps=pipeline.media.fps,
            audio_num_frames=3,
            isolate_modalities=True,
            use_cross_timestep=True,
            return_dict=False,
        )
    return StockPipeline._unpack_latents(output_BTC, frames, height, width)


def prompt_features(stock: StockPipeline, captions: list[str]) -> list[dict[str, torch.Tensor]]:
    states, mask_BL, *_ = stock.encode_prompt(
        captions, do_classifier_free_guidance=False, max_sequence_length=TEXT_TOKENS, device="cpu"
    )
    text_BLD, _, seen_BL = stock.connectors(states, mask_BL, padding_side=stock.tokenizer.padding_side)
    # Nothing is masked, so that ours has no mask.
    assert seen_BL.all()
    return [{"gemma3": text_LD} for text_LD in text_BLD]


def stock_latents(stock: StockPipeline, pixels_BCFHW: torch.Tensor) -> torch.Tensor:
    vae = stock.vae
    latents = vae.encode(pixels_BCFHW).latent_dist.mode()
    return StockPipeline._normalize_latents(latents, vae.latents_mean, vae.latents_std, vae.config.scaling_factor)


def isolated(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Calls the stock transformer with isolated streams."""
    return args, {**kwargs, "isolate_modalities": True}


def draw(stock: StockPipeline, sampling: SamplingSettings, noise: torch.Tensor) -> torch.Tensor:
    keys = {
        "num_frames": sampling.frames,
        "frame_rate": FPS,
        "max_sequence_length": TEXT_TOKENS,
        **dict.fromkeys(("stg_scale", "audio_stg_scale", "guidance_rescale", "audio_guidance_rescale"), 0.0),
        **dict.fromkeys(("modality_scale", "audio_modality_scale"), 1.0),
    }
    stock.transformer.register_forward_pre_hook(isolated, with_kwargs=True)
    latents = drawn(stock, sampling, StockPipeline._pack_latents(noise), **keys).frames
    vae = stock.vae
    return StockPipeline._normalize_latents(latents, vae.latents_mean, vae.latents_std, vae.config.scaling_factor)
