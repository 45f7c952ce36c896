"""Lightricks' names of LTX-Video, which are also ComfyUI's."""

from __future__ import annotations

from models.foundation.checkpoints.key_layouts import KeyLayout, KeyRule

BLOCK = "transformer_blocks.{}"
ATTENTION = {"q_norm": "norm_q", "k_norm": "norm_k", **{name: name for name in ("to_q", "to_k", "to_v", "to_out.0")}}
SAME = (
    *(f"caption_projection.linear_{number}" for number in (1, 2)),
    *(f"{BLOCK}.{name}" for name in ("ff.net.0.proj", "ff.net.2", "norm1", "norm2", "scale_shift_table")),
    "scale_shift_table",
    "proj_out",
)
LTX_VIDEO_LAYOUT = KeyLayout(
    [
        KeyRule("patchify_proj", ("proj_in",)),
        *(
            KeyRule(f"{BLOCK}.{attention}.{there}", (f"{BLOCK}.{attention}.{here}",))
            for attention in ("attn1", "attn2")
            for there, here in ATTENTION.items()
        ),
        *(
            KeyRule(f"adaln_single.{name}", (f"time_embed.{name}",))
            for name in ("emb.timestep_embedder.linear_1", "emb.timestep_embedder.linear_2", "linear")
        ),
        *(KeyRule(name, (name,)) for name in SAME),
    ]
)
