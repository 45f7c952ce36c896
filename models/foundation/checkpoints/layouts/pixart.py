"""The publisher's names of PixArt-alpha and PixArt-Sigma, which are also ComfyUI's."""

from __future__ import annotations

from models.foundation.checkpoints.key_layouts import KeyLayout, KeyRule

EMBEDDED = {
    "t_embedder": "timestep_embedder",
    "csize_embedder": "resolution_embedder",
    "ar_embedder": "aspect_ratio_embedder",
}
"""What is embedded by two Linears, as 0 and 2 there."""
ENDS = {
    "t_block.1": "adaln_single.linear",
    "x_embedder.proj": "pos_embed.proj",
    **{f"y_embedder.y_proj.fc{number}": f"caption_projection.linear_{number}" for number in (1, 2)},
    "final_layer.linear": "proj_out",
    "final_layer.scale_shift_table": "scale_shift_table",
}
BLOCK = {
    "attn.proj": "attn1.to_out.0",
    "cross_attn.q_linear": "attn2.to_q",
    "cross_attn.proj": "attn2.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
    "scale_shift_table": "scale_shift_table",
}
PIXART_LAYOUT = KeyLayout(
    [
        *(KeyRule(there, (here,)) for there, here in ENDS.items()),
        *(
            KeyRule(f"{there}.mlp.{number}", (f"adaln_single.emb.{here}.linear_{1 + number // 2}",))
            for there, here in EMBEDDED.items()
            for number in (0, 2)
        ),
        KeyRule("blocks.{}.attn.qkv", tuple(f"transformer_blocks.{{}}.attn1.to_{part}" for part in "qkv")),
        KeyRule("blocks.{}.cross_attn.kv_linear", tuple(f"transformer_blocks.{{}}.attn2.to_{part}" for part in "kv")),
        *(KeyRule(f"blocks.{{}}.{there}", (f"transformer_blocks.{{}}.{here}",)) for there, here in BLOCK.items()),
    ],
    # Places are computed, and the text that is none is that of an empty prompt here.
    unused=("pos_embed", "y_embedder.y_embedding"),
)
