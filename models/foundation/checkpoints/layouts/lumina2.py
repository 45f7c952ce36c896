"""The names of Lumina Image 2.0 that its publisher's files and ComfyUI have."""

from __future__ import annotations

from models.foundation.checkpoints.key_layouts import KeyLayout, KeyRule

MODULATED, CONTEXT = ("noise_refiner", "layers"), "context_refiner"
SHARED = {
    "attention.qkv": tuple(f"attn.to_{part}" for part in "qkv"),
    "attention.q_norm": ("attn.norm_q",),
    "attention.k_norm": ("attn.norm_k",),
    "attention.out": ("attn.to_out.0",),
    **{f"feed_forward.w{number}": (f"feed_forward.linear_{number}",) for number in (1, 2, 3)},
    "attention_norm2": ("norm2",),
    **{name: (name,) for name in ("ffn_norm1", "ffn_norm2")},
}
RENAMED = {
    CONTEXT: {**SHARED, "attention_norm1": ("norm1",)},
    **dict.fromkeys(MODULATED, {**SHARED, "attention_norm1": ("norm1.norm",), "adaLN_modulation.1": ("norm1.linear",)}),
}
COMFYUI_LAYOUT = KeyLayout(
    [
        *(
            KeyRule(f"{blocks}.{{}}.{there}", tuple(f"{blocks}.{{}}.{part}" for part in here))
            for blocks, names in RENAMED.items()
            for there, here in names.items()
        ),
        KeyRule("x_embedder", ("x_embedder",)),
        *(KeyRule(f"cap_embedder.{part}", (f"time_caption_embed.caption_embedder.{part}",)) for part in (0, 1)),
        KeyRule("t_embedder.mlp.0", ("time_caption_embed.timestep_embedder.linear_1",)),
        KeyRule("t_embedder.mlp.2", ("time_caption_embed.timestep_embedder.linear_2",)),
        KeyRule("final_layer.adaLN_modulation.1", ("norm_out.linear_1",)),
        KeyRule("final_layer.linear", ("norm_out.linear_2",)),
    ],
    unused=("norm_final.weight",),
)
