"""The publisher's names of Mochi, which are also ComfyUI's."""

from __future__ import annotations

from models.foundation.checkpoints.key_layouts import KeyLayout, KeyRule

SIDES = {"x": ("to_{}", "norm_{}", "to_out.0", "ff"), "y": ("add_{}_proj", "norm_added_{}", "to_add_out", "ff_context")}
"""What belongs to the clip (x) and to the text (y)."""
AROUND = {
    "x_embedder.proj": "patch_embed.proj",
    "t_embedder.mlp.0": "time_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_embed.timestep_embedder.linear_2",
    **{f"t5_y_embedder.{part}": f"time_embed.pooler.{part}" for part in ("to_kv", "to_q", "to_out")},
    "t5_yproj": "time_embed.caption_proj",
    "pos_frequencies": "pos_frequencies",
    "final_layer.linear": "proj_out",
}


def _rules(side: str) -> list[KeyRule]:
    """Those of a block, for the clip or the text."""
    project, norm, out, ff = SIDES[side]
    there, here = "blocks.{}", "transformer_blocks.{}"
    return [
        KeyRule(f"{there}.attn.qkv_{side}", tuple(f"{here}.attn1.{project.format(part)}" for part in "qkv")),
        *(KeyRule(f"{there}.attn.{part}_norm_{side}", (f"{here}.attn1.{norm.format(part)}",)) for part in "qk"),
        KeyRule(f"{there}.attn.proj_{side}", (f"{here}.attn1.{out}",)),
        # diffusers multiplies the first half with the activation of the second.
        KeyRule(f"{there}.mlp_{side}.w1", (f"{here}.{ff}.net.0.proj",), swap_halves=True),
        KeyRule(f"{there}.mlp_{side}.w2", (f"{here}.{ff}.net.2",)),
    ]


MOCHI_LAYOUT = KeyLayout(
    [
        *_rules("x"),
        *_rules("y"),
        KeyRule("blocks.{}.mod_x", ("transformer_blocks.{}.norm1.linear",)),
        KeyRule("blocks.{}.mod_y", ("transformer_blocks.{}.norm1_context.linear",)),
        # That of the last block, which changes no text.
        KeyRule("blocks.{}.mod_y", ("transformer_blocks.{}.norm1_context.linear_1",)),
        *(KeyRule(there, (here,)) for there, here in AROUND.items()),
        KeyRule("final_layer.mod", ("norm_out.linear",), swap_halves=True),
    ]
)
