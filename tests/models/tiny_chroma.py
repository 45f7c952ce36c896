"""A whole tiny Chroma in diffusers' layout: the miniature Flux's VAE and T5 with a transformer of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import ChromaTransformer2DModel, FlowMatchEulerDiscreteScheduler

from models.chroma import ChromaOptions, ChromaPipeline
from tests.models.tiny_flux import MINI_FLUX
from tests.models.tiny_wan import randomised
from utils.dataset.batches import pad_ragged
from utils.diffusion.seeds import normal

TEXT_TOKENS = 24
TRANSFORMER = {
    "patch_size": 1,
    "in_channels": 16,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 64,
    "axes_dims_rope": (4, 4, 8),
    "approximator_num_channels": 8,
    "approximator_hidden_dim": 16,
    "approximator_layers": 2,
}


def write_folder(place: Path) -> Path:
    torch.manual_seed(0)
    for part, source in {"vae": "vae", "text_encoder": "text_encoder_2", "tokenizer": "tokenizer_2"}.items():
        (place / part).symlink_to(MINI_FLUX / source)
    randomised(ChromaTransformer2DModel(**TRANSFORMER), 1).save_pretrained(place / "transformer")
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(place / "scheduler")
    return place


def pipeline(folder: Path, **options: Any) -> ChromaPipeline:
    options = {"dtype": "float32", "max_sequence_length": TEXT_TOKENS, **options}
    return ChromaPipeline(ChromaOptions(type="chroma", diffusers_path=folder, **options), seed=0)


def features(lengths: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Random text features of these many tokens each."""
    rows = [normal((length, 64), 0, "text", length) for length in lengths]
    return {"t5": pad_ragged(rows), "t5_mask": pad_ragged([torch.ones(len(row), dtype=torch.bool) for row in rows])}
