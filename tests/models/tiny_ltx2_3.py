"""A whole tiny LTX-2.3: with gates, with modulated texts, whose connectors make them as wide as the model; the rest as
in `tiny_ltx2.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.models import tiny_ltx2
from tests.models.tiny_ltx2 import SAMPLING, SIZES, STOCK, TEXT_TOKENS, draw, pipeline, prompt_features, whole
from utils.diffusion.seeds import normal

__all__ = ["SAMPLING", "SIZES", "STOCK", "draw", "features", "pipeline", "prompt_features", "whole", "write_folder"]
CHANGES = {
    **dict.fromkeys(("gated_attn", "cross_attn_mod", "audio_gated_attn", "audio_cross_attn_mod"), True),
    "use_prompt_embeddings": False,
    "perturbed_attn": True,
}
CUT = {"partition_method": "manual", "partition_split": [2, 3]}
"""Each stage gets a block: the entry has most of the parameters."""
VIDEO, SOUND = (tiny_ltx2.TRANSFORMER[key] for key in ("cross_attention_dim", "audio_cross_attention_dim"))
CONNECTORS = {
    "per_modality_projections": True,
    "video_hidden_dim": VIDEO,
    "audio_hidden_dim": SOUND,
    "video_connector_attention_head_dim": VIDEO // 2,
    "audio_connector_attention_head_dim": SOUND // 2,
    "video_gated_attn": True,
    "audio_gated_attn": True,
    "rope_type": "split",
    "proj_bias": True,
}


def write_folder(folder: Path, **changes: Any) -> Path:
    """`changes` are the transformer's."""
    return tiny_ltx2.write_folder(folder, connectors=CONNECTORS, **{**CHANGES, **changes})


def features(lengths: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Random text features, which are of one length for all texts."""
    return {"gemma3": torch.stack([normal((TEXT_TOKENS, VIDEO), 0, "text", length) for length in lengths])}
