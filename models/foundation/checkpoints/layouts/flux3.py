"""Black Forest Labs' names of Flux.3, which are also those of adapters for ComfyUI."""

from __future__ import annotations

from models.foundation.checkpoints.key_layouts import KeyLayout, KeyRule

PICTURES = ("image", "image_cond")
BLOCKS = {
    **{f"content_mode_blocks.{mode}.{{}}": f"mode_blocks.{mode}.{{}}" for mode in PICTURES},
    "txt_mode_blocks.{}": "txt_mode_blocks.{}",
    "single_blocks.{}": "single_transformer_blocks.{}",
}
LINEARS = {
    **{f"{part}_proj": f"attn.to_{part}" for part in "qkv"},
    "attn_out": "attn.to_out.0",
    "mlp_in": "ff.linear_in",
    "mlp_out": "ff.linear_out",
}
NORMS = {"norm.query_norm": "attn.norm_q", "norm.key_norm": "attn.norm_k"}
FLUX3_LAYOUT = KeyLayout(
    [
        # A module that no other model has, so that it identifies a file.
        *(KeyRule(f"emb_in.{mode}", (f"x_embedders.{mode}",)) for mode in PICTURES),
        *(
            KeyRule(f"{stream}_stream_modulations.{mode}.lin", (f"{stream}_stream_modulations.{mode}.linear",))
            for stream in ("early", "single")
            for mode in (*PICTURES, "txt")
        ),
        KeyRule("txt_in", ("context_embedder",)),
        KeyRule("time_in.in_layer", ("timestep_embedder.linear_1",)),
        KeyRule("time_in.out_layer", ("timestep_embedder.linear_2",)),
        *(KeyRule(f"{there}.{a}", (f"{here}.{b}",)) for there, here in BLOCKS.items() for a, b in LINEARS.items()),
        *(
            KeyRule(f"{there}.{a}", (f"{here}.{b}",), weight_there="scale")
            for there, here in BLOCKS.items()
            for a, b in NORMS.items()
        ),
        KeyRule("final_layer.image.linear", ("proj_out",)),
        KeyRule("final_layer.image.adaLN_modulation.1", ("norm_out.linear",), swap_halves=True),
    ]
)
