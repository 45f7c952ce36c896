"""OmniGen2's names in its publisher's folder, which are also those of single files and of ComfyUI."""

from __future__ import annotations

from models.foundation.checkpoints.key_layouts import KeyLayout, KeyRule

MODULATED, CONTEXT = ("noise_refiner", "ref_image_refiner", "layers"), "context_refiner"
SHARED = (
    *(f"attn.{part}" for part in ("to_q", "to_k", "to_v", "to_out.0", "norm_q", "norm_k")),
    *(f"feed_forward.linear_{number}" for number in (1, 2, 3)),
    *("norm2", "ffn_norm1", "ffn_norm2"),
)
BLOCKS = {
    **dict.fromkeys(MODULATED, (*SHARED, "norm1.linear", "norm1.norm")),
    CONTEXT: (*SHARED, "norm1"),
}
OTHERS = (
    "ref_image_patch_embedder",
    "x_embedder",
    "image_index_embedding",
    *(f"time_caption_embed.timestep_embedder.linear_{number}" for number in (1, 2)),
    *(f"time_caption_embed.caption_embedder.{number}" for number in (0, 1)),
    *(f"norm_out.linear_{number}" for number in (1, 2)),
)
OMNIGEN2_LAYOUT = KeyLayout(
    [
        KeyRule(name, (name,))
        for name in (*OTHERS, *(f"{blocks}.{{}}.{part}" for blocks, parts in BLOCKS.items() for part in parts))
    ]
)
