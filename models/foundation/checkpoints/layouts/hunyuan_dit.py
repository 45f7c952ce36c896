"""Tencent's names of HunyuanDiT, which are also ComfyUI's."""

from __future__ import annotations

from models.foundation.checkpoints.key_layouts import KeyLayout, KeyRule

IN_BLOCK = {
    "attn1.Wqkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "attn2.q_proj": ("attn2.to_q",),
    "attn2.kv_proj": ("attn2.to_k", "attn2.to_v"),
    **{f"attn{n}.{part}_norm": (f"attn{n}.norm_{part}",) for n in (1, 2) for part in "qk"},
    **{f"attn{n}.out_proj": (f"attn{n}.to_out.0",) for n in (1, 2)},
    "default_modulation.1": ("norm1.linear",),
    "norm1": ("norm1.norm",),
    # diffusers counts norms in the order in which they are applied.
    "norm3": ("norm2",),
    "norm2": ("norm3",),
    "mlp.fc1": ("ff.net.0.proj",),
    "mlp.fc2": ("ff.net.2",),
    "skip_norm": ("skip_norm",),
    "skip_linear": ("skip_linear",),
}
AROUND = {
    "x_embedder.proj": "pos_embed.proj",
    "text_embedding_padding": "text_embedding_padding",
    "mlp_t5.0": "text_embedder.linear_1",
    "mlp_t5.2": "text_embedder.linear_2",
    "t_embedder.mlp.0": "time_extra_emb.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_extra_emb.timestep_embedder.linear_2",
    "extra_embedder.0": "time_extra_emb.extra_embedder.linear_1",
    "extra_embedder.2": "time_extra_emb.extra_embedder.linear_2",
    **{f"pooler.{part}_proj": f"time_extra_emb.pooler.{part}_proj" for part in "qkvc"},
    "pooler.positional_embedding": "time_extra_emb.pooler.positional_embedding",
    "style_embedder": "time_extra_emb.style_embedder",
    "final_layer.linear": "proj_out",
}
ORIGINAL_LAYOUT = KeyLayout(
    [
        *(
            KeyRule(f"blocks.{{}}.{there}", tuple(f"blocks.{{}}.{part}" for part in here))
            for there, here in IN_BLOCK.items()
        ),
        *(KeyRule(there, (here,)) for there, here in AROUND.items()),
        KeyRule("final_layer.adaLN_modulation.1", ("norm_out.linear",), swap_halves=True),
    ]
)
