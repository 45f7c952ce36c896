"""The publisher's names of Sana and Sana 1.5, which are also those of ComfyUI's extension for them."""

from __future__ import annotations

from models.foundation.checkpoints.key_layouts import KeyLayout, KeyRule

ENDS = {
    # By the first rule a file is known.
    "attention_y_norm": "caption_norm",
    "x_embedder.proj": "patch_embed.proj",
    **{f"y_embedder.y_proj.fc{number}": f"caption_projection.linear_{number}" for number in (1, 2)},
    **{f"t_embedder.mlp.{number}": f"time_embed.emb.timestep_embedder.linear_{1 + number // 2}" for number in (0, 2)},
    "t_block.1": "time_embed.linear",
    "final_layer.linear": "proj_out",
    "final_layer.scale_shift_table": "scale_shift_table",
}
BLOCK = {
    "attn.proj": "attn1.to_out.0",
    "attn.q_norm": "attn1.norm_q",
    "attn.k_norm": "attn1.norm_k",
    "cross_attn.q_linear": "attn2.to_q",
    "cross_attn.q_norm": "attn2.norm_q",
    "cross_attn.k_norm": "attn2.norm_k",
    "cross_attn.proj": "attn2.to_out.0",
    "mlp.inverted_conv.conv": "ff.conv_inverted",
    "mlp.depth_conv.conv": "ff.conv_depth",
    "mlp.point_conv.conv": "ff.conv_point",
    "scale_shift_table": "scale_shift_table",
}
"""Only Sana 1.5 has norms of queries and keys."""
SANA_LAYOUT = KeyLayout(
    [
        *(KeyRule(there, (here,)) for there, here in ENDS.items()),
        KeyRule("blocks.{}.attn.qkv", tuple(f"transformer_blocks.{{}}.attn1.to_{part}" for part in "qkv")),
        KeyRule("blocks.{}.cross_attn.kv_linear", tuple(f"transformer_blocks.{{}}.attn2.to_{part}" for part in "kv")),
        *(KeyRule(f"blocks.{{}}.{there}", (f"transformer_blocks.{{}}.{here}",)) for there, here in BLOCK.items()),
    ],
    # Places are computed, the text that is none is that of an empty prompt here, and the last was of training.
    unused=("pos_embed", "y_embedder.y_embedding", "logvar_linear."),
)
