"""NVIDIA's names of Cosmos 1.0, which are also ComfyUI's."""

from __future__ import annotations

from models.foundation.checkpoints.key_layouts import KeyLayout, KeyRule

BLOCKS = ("blocks.block{}.blocks", "transformer_blocks.{}")
ATTENTION = {
    "to_q.0": "to_q",
    "to_k.0": "to_k",
    "to_v.0": "to_v",
    "to_out.0": "to_out.0",
    "to_q.1": "norm_q",
    "to_k.1": "norm_k",
}
PARTS = {
    **{f"{number}.block.attn.{a}": f"attn{number + 1}.{b}" for number in (0, 1) for a, b in ATTENTION.items()},
    "2.block.layer1": "ff.net.0.proj",
    "2.block.layer2": "ff.net.2",
    **{
        f"{number}.adaLN_modulation.{linear}": f"norm{number + 1}.linear_{linear}"
        for number in (0, 1, 2)
        for linear in (1, 2)
    },
}
AXES = "thw"
COSMOS_LAYOUT = KeyLayout(
    [
        *(KeyRule(f"{BLOCKS[0]}.{there}", (f"{BLOCKS[1]}.{here}",)) for there, here in PARTS.items()),
        KeyRule("x_embedder.proj.1", ("patch_embed.proj",)),
        *(KeyRule(f"extra_pos_embedder.pos_emb_{axis}", (f"learnable_pos_embed.pos_emb_{axis}",)) for axis in AXES),
        KeyRule("t_embedder.1.linear_1", ("time_embed.t_embedder.linear_1",)),
        KeyRule("t_embedder.1.linear_2", ("time_embed.t_embedder.linear_2",)),
        KeyRule("affline_norm", ("time_embed.norm",)),
        KeyRule("final_layer.adaLN_modulation.1", ("norm_out.linear_1",)),
        KeyRule("final_layer.adaLN_modulation.2", ("norm_out.linear_2",)),
        KeyRule("final_layer.linear", ("proj_out",)),
    ]
)
