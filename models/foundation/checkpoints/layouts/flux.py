"""Black Forest Labs' names of Flux.1, which are also ComfyUI's."""

from __future__ import annotations

from models.foundation.checkpoints.key_layouts import KeyLayout, KeyRule

# The queries, keys and values of a single block, as ByteDance's USO adapts them.
USO = [KeyRule("single_blocks.{}.linear1_qkv", tuple(f"single_transformer_blocks.{{}}.attn.to_{p}" for p in "qkv"))]
BFL_LAYOUT = KeyLayout(
    [
        KeyRule("double_blocks.{}.img_attn.qkv", tuple(f"transformer_blocks.{{}}.attn.to_{p}" for p in "qkv")),
        KeyRule("double_blocks.{}.txt_attn.qkv", tuple(f"transformer_blocks.{{}}.attn.add_{p}_proj" for p in "qkv")),
        KeyRule(
            "double_blocks.{}.img_attn.norm.query_norm", ("transformer_blocks.{}.attn.norm_q",), weight_there="scale"
        ),
        KeyRule(
            "double_blocks.{}.img_attn.norm.key_norm", ("transformer_blocks.{}.attn.norm_k",), weight_there="scale"
        ),
        KeyRule(
            "double_blocks.{}.txt_attn.norm.query_norm",
            ("transformer_blocks.{}.attn.norm_added_q",),
            weight_there="scale",
        ),
        KeyRule(
            "double_blocks.{}.txt_attn.norm.key_norm",
            ("transformer_blocks.{}.attn.norm_added_k",),
            weight_there="scale",
        ),
        KeyRule("double_blocks.{}.img_attn.proj", ("transformer_blocks.{}.attn.to_out.0",)),
        KeyRule("double_blocks.{}.txt_attn.proj", ("transformer_blocks.{}.attn.to_add_out",)),
        KeyRule("double_blocks.{}.img_mod.lin", ("transformer_blocks.{}.norm1.linear",)),
        KeyRule("double_blocks.{}.txt_mod.lin", ("transformer_blocks.{}.norm1_context.linear",)),
        KeyRule("double_blocks.{}.img_mlp.0", ("transformer_blocks.{}.ff.net.0.proj",)),
        KeyRule("double_blocks.{}.img_mlp.2", ("transformer_blocks.{}.ff.net.2",)),
        KeyRule("double_blocks.{}.txt_mlp.0", ("transformer_blocks.{}.ff_context.net.0.proj",)),
        KeyRule("double_blocks.{}.txt_mlp.2", ("transformer_blocks.{}.ff_context.net.2",)),
        KeyRule(
            "single_blocks.{}.linear1",
            (*(f"single_transformer_blocks.{{}}.attn.to_{p}" for p in "qkv"), "single_transformer_blocks.{}.proj_mlp"),
        ),
        KeyRule("single_blocks.{}.linear2", ("single_transformer_blocks.{}.proj_out",)),
        KeyRule(
            "single_blocks.{}.norm.query_norm", ("single_transformer_blocks.{}.attn.norm_q",), weight_there="scale"
        ),
        KeyRule("single_blocks.{}.norm.key_norm", ("single_transformer_blocks.{}.attn.norm_k",), weight_there="scale"),
        KeyRule("single_blocks.{}.modulation.lin", ("single_transformer_blocks.{}.norm.linear",)),
        KeyRule("img_in", ("x_embedder",)),
        KeyRule("txt_in", ("context_embedder",)),
        *(
            KeyRule(f"{there}_in.{layer}_layer", (f"time_text_embed.{here}_embedder.linear_{number}",))
            for there, here in (("time", "timestep"), ("vector", "text"), ("guidance", "guidance"))
            for number, layer in ((1, "in"), (2, "out"))
        ),
        KeyRule("final_layer.adaLN_modulation.1", ("norm_out.linear",), swap_halves=True),
        KeyRule("final_layer.linear", ("proj_out",)),
    ],
    further=USO,
    parts_are_known=True,
)
