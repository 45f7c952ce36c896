"""Stability's names of Stable Diffusion 3, which are also ComfyUI's."""

from __future__ import annotations

from models.foundation.checkpoints.key_layouts import KeyLayout, KeyRule

POSITIONS = "pos_embed.pos_embed"

IMAGE_ATTENTION = {"qkv": ("to_q", "to_k", "to_v"), "ln_q": ("norm_q",), "ln_k": ("norm_k",), "proj": ("to_out.0",)}
TEXT_ATTENTION = {
    "qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
    "ln_q": ("norm_added_q",),
    "ln_k": ("norm_added_k",),
    "proj": ("to_add_out",),
}
ATTENTIONS = (
    ("x_block.attn", "attn", IMAGE_ATTENTION),
    ("x_block.attn2", "attn2", IMAGE_ATTENTION),
    ("context_block.attn", "attn", TEXT_ATTENTION),
)
MODULES = {
    "x_block.mlp.fc1": "ff.net.0.proj",
    "x_block.mlp.fc2": "ff.net.2",
    "x_block.adaLN_modulation.1": "norm1.linear",
    "context_block.mlp.fc1": "ff_context.net.0.proj",
    "context_block.mlp.fc2": "ff_context.net.2",
}


def mmdit_layout(num_layers: int) -> KeyLayout:
    """Stability's names. The last block only reads the text: its modulation has two parts, and their order differs."""
    return KeyLayout(
        [
            *(
                KeyRule(
                    f"joint_blocks.{{}}.{there}.{name}", tuple(f"transformer_blocks.{{}}.{here}.{p}" for p in parts)
                )
                for there, here, attention in ATTENTIONS
                for name, parts in attention.items()
            ),
            *(
                KeyRule(f"joint_blocks.{{}}.{there}", (f"transformer_blocks.{{}}.{here}",))
                for there, here in MODULES.items()
            ),
            *(
                KeyRule(
                    f"joint_blocks.{number}.context_block.adaLN_modulation.1",
                    (f"transformer_blocks.{number}.norm1_context.linear",),
                    swap_halves=number == num_layers - 1,
                )
                for number in range(num_layers)
            ),
            KeyRule("pos_embed", (POSITIONS,)),
            KeyRule("x_embedder.proj", ("pos_embed.proj",)),
            KeyRule("context_embedder", ("context_embedder",)),
            *(
                KeyRule(f"{there}_embedder.mlp.{index}", (f"time_text_embed.{here}_embedder.linear_{number}",))
                for there, here in (("t", "timestep"), ("y", "text"))
                for index, number in ((0, 1), (2, 2))
            ),
            KeyRule("final_layer.adaLN_modulation.1", ("norm_out.linear",), swap_halves=True),
            KeyRule("final_layer.linear", ("proj_out",)),
        ],
        parts_are_known=True,
    )
