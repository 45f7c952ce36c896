"""Names of Qwen-Image, which are those of diffusers; and the tensor by which ComfyUI knows an Edit-2511."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from models.foundation.checkpoints.key_layouts import KeyLayout, KeyRule

TIMESTEP_ZERO = "__index_timestep_zero__"
"""The empty tensor by which ComfyUI recognises a model that treats control images as free of noise (2511)."""
PARTS_OF_A_BLOCK = (
    *(f"attn.to_{part}" for part in ("q", "k", "v", "out.0", "add_out")),
    *(f"attn.add_{part}_proj" for part in "qkv"),
    *(f"attn.norm_{part}" for part in ("q", "k", "added_q", "added_k")),
    *(f"{stream}_{part}" for stream in ("img", "txt") for part in ("mod.1", "mlp.net.0.proj", "mlp.net.2")),
)
AROUND_THE_BLOCKS = (
    # The first rule is a module that no other model has, so that it identifies a file.
    "txt_norm",
    "img_in",
    "txt_in",
    "time_text_embed.timestep_embedder.linear_1",
    "time_text_embed.timestep_embedder.linear_2",
    "norm_out.linear",
    "proj_out",
)
NAMES = (*AROUND_THE_BLOCKS, *(f"transformer_blocks.{{}}.{part}" for part in PARTS_OF_A_BLOCK))
QWEN_LAYOUT = KeyLayout([KeyRule(name, (name,)) for name in NAMES])


class TimestepZeroLayout(KeyLayout):
    """The layout of a 2511 model, with the tensor by which ComfyUI recognises it."""

    def to_original(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {**super().to_original(tensors), TIMESTEP_ZERO: torch.empty(0)}
