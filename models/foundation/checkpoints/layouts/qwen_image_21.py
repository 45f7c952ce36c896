"""Names of Qwen-Image 2.1: the publisher's are those of diffusers, and ComfyUI's files fuse two matrices."""

from __future__ import annotations

from models.foundation.checkpoints.key_layouts import KeyLayout, KeyRule

FUSED = {"img_mlp.gate_up": ("img_mlp.gate_layer", "img_mlp.proj")}
OF_A_BLOCK = (*(f"attn.{part}" for part in ("to_q", "to_k", "to_v", "to_out.0", "norm_q", "norm_k")), "img_mlp.out")
AROUND_THE_BLOCKS = (
    *(f"txt_in.{part}" for part in ("text_norm", "in_layer", "out_layer")),
    "img_in",
    "modulation.1",
    *(f"time_text_embed.timestep_embedder.linear_{number}" for number in (1, 2)),
    "norm_out.linear",
    "proj_out",
)
BLOCK = "transformer_blocks.{}."
QWEN_21_LAYOUT = KeyLayout(
    [
        # The first rule is the module by which a file of ComfyUI's is known.
        *(KeyRule(BLOCK + there, tuple(BLOCK + part for part in here)) for there, here in FUSED.items()),
        *(KeyRule(BLOCK + name, (BLOCK + name,)) for name in OF_A_BLOCK),
        *(KeyRule(name, (name,)) for name in AROUND_THE_BLOCKS),
    ],
)
