"""Kandinsky 5's names in its publisher's files, which are those of diffusers and of ComfyUI."""

from __future__ import annotations

from models.foundation.checkpoints.key_layouts import KeyLayout, KeyRule

FEED_FORWARD = ("feed_forward.in_layer", "feed_forward.out_layer")
ATTENTION = ("to_query", "to_key", "to_value", "query_norm", "key_norm", "out_layer")
SELF_ATTENTION = tuple(f"self_attention.{part}" for part in ATTENTION)
CROSS_ATTENTION = tuple(f"cross_attention.{part}" for part in ATTENTION)
BLOCKS = {
    "visual_transformer_blocks": (
        "visual_modulation.out_layer",
        *SELF_ATTENTION,
        *CROSS_ATTENTION,
        *FEED_FORWARD,
    ),
    "text_transformer_blocks": ("text_modulation.out_layer", *SELF_ATTENTION, *FEED_FORWARD),
}
OTHERS = (
    "visual_embeddings.in_layer",
    "time_embeddings.in_layer",
    "time_embeddings.out_layer",
    "text_embeddings.in_layer",
    "text_embeddings.norm",
    "pooled_text_embeddings.in_layer",
    "pooled_text_embeddings.norm",
    "out_layer.modulation.out_layer",
    "out_layer.out_layer",
)
KANDINSKY5_LAYOUT = KeyLayout(
    [
        KeyRule(name, (name,))
        # The first one is of no other model, so that it identifies a file.
        for name in (*(f"{blocks}.{{}}.{part}" for blocks, parts in BLOCKS.items() for part in parts), *OTHERS)
    ]
)
