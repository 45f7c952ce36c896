"""The names of Z-Image that its publisher's files and ComfyUI have."""

from __future__ import annotations

from models.foundation.checkpoints.key_layouts import KeyLayout, KeyRule

PATCH_KEY = "2-1"
"""The key of the embedding and the final layer for patches of 2x2 cells of one frame; Z-Image has no others."""
BLOCKS = ("noise_refiner", "context_refiner", "layers")
RENAMED = {
    "attention.qkv": tuple(f"attention.to_{part}" for part in "qkv"),
    "attention.q_norm": ("attention.norm_q",),
    "attention.k_norm": ("attention.norm_k",),
    "attention.out": ("attention.to_out.0",),
}
KEPT = (
    *(f"feed_forward.w{number}" for number in (1, 2, 3)),
    *(f"{part}_norm{number}" for part in ("attention", "ffn") for number in (1, 2)),
    "adaLN_modulation.0",
)
COMFYUI_LAYOUT = KeyLayout(
    [
        *(
            KeyRule(f"{blocks}.{{}}.{there}", tuple(f"{blocks}.{{}}.{part}" for part in here))
            for blocks in BLOCKS
            for there, here in {**RENAMED, **{name: (name,) for name in KEPT}}.items()
        ),
        KeyRule("x_embedder", (f"all_x_embedder.{PATCH_KEY}",)),
        KeyRule("final_layer.linear", (f"all_final_layer.{PATCH_KEY}.linear",)),
        KeyRule("final_layer.adaLN_modulation.1", (f"all_final_layer.{PATCH_KEY}.adaLN_modulation.1",)),
        *(KeyRule(f"t_embedder.mlp.{number}", (f"t_embedder.mlp.{number}",)) for number in (0, 2)),
        *(KeyRule(f"cap_embedder.{number}", (f"cap_embedder.{number}",)) for number in (0, 1)),
        *(KeyRule(name, (name,)) for name in ("x_pad_token", "cap_pad_token")),
    ],
    unused=("norm_final.weight",),
    parts_are_known=True,
)
