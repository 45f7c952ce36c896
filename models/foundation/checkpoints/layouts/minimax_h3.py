"""The names of MiniMax-H3 in its publisher's code and in ComfyUI's files, in which the rows of `qkv_proj` are those of
the queries, then of the keys, then of the values. In MiniMax's own files they are sorted by heads, and nothing in a
file tells."""

from __future__ import annotations

from models.foundation.checkpoints.key_layouts import KeyLayout, KeyRule

BLOCKS = {"blocks.{}": "transformer_blocks.{}", "token_refiner.blocks.{}": "token_refiner.refiner_blocks.{}"}
PARTS = {
    "norm1": "norm1",
    "norm2": "norm2",
    "attn.q_norm": "attn.norm_q",
    "attn.k_norm": "attn.norm_k",
    "attn.out_proj": "attn.to_out.0",
    "mlp.fc2": "ff.net.2",
}
ENDS = {
    "token_refiner.final_norm": "token_refiner.final_norm",
    "video_patch_proj": "proj_in",
    "audio_patch_proj": "audio_proj_in",
    "condition_proj": "context_embedder",
    "time_embedder.proj_in": "time_embedder.linear_1",
    "time_embedder.proj_out": "time_embedder.linear_2",
    "final_layer.norm": "norm_out.norm",
    "final_layer.adaln_proj.linear": "norm_out.linear",
    "final_layer.video_out": "proj_out",
    "final_layer.audio_out": "audio_proj_out",
}
MINIMAX_H3_LAYOUT = KeyLayout(
    [
        # A module that no other model has, so that it identifies a file.
        KeyRule(
            "token_refiner.blocks.{}.attn.qkv_proj",
            tuple(f"token_refiner.refiner_blocks.{{}}.attn.to_{part}" for part in "qkv"),
        ),
        KeyRule("blocks.{}.attn.qkv_proj", tuple(f"transformer_blocks.{{}}.attn.to_{part}" for part in "qkv")),
        *(KeyRule(f"{there}.{a}", (f"{here}.{b}",)) for there, here in BLOCKS.items() for a, b in PARTS.items()),
        # The gate comes first there.
        *(KeyRule(f"{there}.mlp.fc1", (f"{here}.ff.net.0.proj",), swap_halves=True) for there, here in BLOCKS.items()),
        KeyRule("blocks.{}.adaln_proj.linear", ("transformer_blocks.{}.adaln_proj.linear",)),
        *(KeyRule(there, (here,)) for there, here in ENDS.items()),
    ],
    # The angles of positions, which are computed.
    unused=("rope.inv_freq",),
)
