"""Black Forest Labs' names of Flux.2, which are also ComfyUI's."""

from __future__ import annotations

from models.foundation.checkpoints.key_layouts import KeyLayout, KeyRule
from models.foundation.checkpoints.layouts.flux import BFL_LAYOUT

# Of Flux.1's names: what follows is other modules in Flux.2.
OTHERWISE = ("_mlp.", "_mod.lin", "single_blocks.", "modulation.lin", "_in.in_layer", "_in.out_layer")
DOUBLE, SINGLE = "transformer_blocks.{}", "single_transformer_blocks.{}"
FLUX2_LAYOUT = KeyLayout(
    [
        *(rule for rule in BFL_LAYOUT.rules if not any(part in rule.there for part in OTHERWISE)),
        *(
            KeyRule(f"double_blocks.{{}}.{there}_mlp.{number}", (f"{DOUBLE}.{here}.linear_{way}",))
            for there, here in (("img", "ff"), ("txt", "ff_context"))
            for number, way in ((0, "in"), (2, "out"))
        ),
        KeyRule("single_blocks.{}.linear1", (f"{SINGLE}.attn.to_qkv_mlp_proj",)),
        KeyRule("single_blocks.{}.linear2", (f"{SINGLE}.attn.to_out",)),
        KeyRule("single_blocks.{}.norm.query_norm", (f"{SINGLE}.attn.norm_q",), weight_there="scale"),
        KeyRule("single_blocks.{}.norm.key_norm", (f"{SINGLE}.attn.norm_k",), weight_there="scale"),
        *(
            KeyRule(f"{name}.lin", (f"{name}.linear",))
            for name in ("double_stream_modulation_img", "double_stream_modulation_txt", "single_stream_modulation")
        ),
        *(
            KeyRule(f"{there}_in.{layer}_layer", (f"time_guidance_embed.{here}_embedder.linear_{number}",))
            for there, here in (("time", "timestep"), ("guidance", "guidance"))
            for number, layer in ((1, "in"), (2, "out"))
        ),
    ],
    parts_are_known=True,
)
