"""The publisher's and ComfyUI's names of Ideogram 4: those of diffusers, but for the attention."""

from __future__ import annotations

from models.foundation.checkpoints.key_layouts import KeyLayout, KeyRule

PARTS_OF_A_BLOCK = (
    "adaln_modulation",
    *(f"attention.norm_{part}" for part in "qk"),
    *(f"feed_forward.w{number}" for number in (1, 2, 3)),
    *(f"{part}_norm{number}" for part in ("attention", "ffn") for number in (1, 2)),
)
AROUND_THE_BLOCKS = (
    "input_proj",
    "llm_cond_norm",
    "llm_cond_proj",
    "t_embedding.mlp_in",
    "t_embedding.mlp_out",
    "adaln_proj",
    "embed_image_indicator",
    "final_layer.linear",
    "final_layer.adaln_modulation",
)
IDEOGRAM4_LAYOUT = KeyLayout(
    [
        KeyRule("layers.{}.attention.qkv", tuple(f"layers.{{}}.attention.to_{part}" for part in "qkv")),
        KeyRule("layers.{}.attention.o", ("layers.{}.attention.to_out.0",)),
        *(
            KeyRule(name, (name,))
            for name in (*AROUND_THE_BLOCKS, *(f"layers.{{}}.{part}" for part in PARTS_OF_A_BLOCK))
        ),
    ]
)
