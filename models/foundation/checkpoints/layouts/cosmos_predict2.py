"""NVIDIA's names of Cosmos-Predict2 and 2.5, which are also ComfyUI's."""

from __future__ import annotations

from models.foundation.checkpoints.key_layouts import KeyLayout, KeyRule

BLOCKS = ("blocks.{}", "transformer_blocks.{}")
PARTS = {
    **{
        f"{there}.{name}": f"{here}.{ours}"
        for there, here in (("self_attn", "attn1"), ("cross_attn", "attn2"))
        for name, ours in {
            "q_proj": "to_q",
            "k_proj": "to_k",
            "v_proj": "to_v",
            "output_proj": "to_out.0",
            "q_norm": "norm_q",
            "k_norm": "norm_k",
        }.items()
    },
    "mlp.layer1": "ff.net.0.proj",
    "mlp.layer2": "ff.net.2",
    **{
        f"adaln_modulation_{there}.{number}": f"norm{position}.linear_{number}"
        for position, there in enumerate(("self_attn", "cross_attn", "mlp"), start=1)
        for number in (1, 2)
    },
}
COSMOS_PREDICT2_LAYOUT = KeyLayout(
    [
        *(KeyRule(f"{BLOCKS[0]}.{there}", (f"{BLOCKS[1]}.{here}",)) for there, here in PARTS.items()),
        KeyRule("x_embedder.proj.1", ("patch_embed.proj",)),
        # Of 2.5 alone.
        KeyRule("crossattn_proj.0", ("crossattn_proj.0",)),
        KeyRule("t_embedder.1.linear_1", ("time_embed.t_embedder.linear_1",)),
        KeyRule("t_embedder.1.linear_2", ("time_embed.t_embedder.linear_2",)),
        KeyRule("t_embedding_norm", ("time_embed.norm",)),
        KeyRule("final_layer.adaln_modulation.1", ("norm_out.linear_1",)),
        KeyRule("final_layer.adaln_modulation.2", ("norm_out.linear_2",)),
        KeyRule("final_layer.linear", ("proj_out",)),
    ]
)
