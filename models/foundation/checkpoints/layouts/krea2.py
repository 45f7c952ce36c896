"""Krea's names of Krea 2, which are also ComfyUI's."""

from __future__ import annotations

from models.foundation.checkpoints.key_layouts import KeyLayout, KeyRule

LINEARS = {
    "attn.wq": "attn.to_q",
    "attn.wk": "attn.to_k",
    "attn.wv": "attn.to_v",
    "attn.wo": "attn.to_out.0",
    "attn.gate": "attn.to_gate",
    **{f"mlp.{part}": f"ff.{part}" for part in ("gate", "up", "down")},
}
NORMS = {
    "prenorm": "norm1",
    "postnorm": "norm2",
    "attn.qknorm.qnorm": "attn.norm_q",
    "attn.qknorm.knorm": "attn.norm_k",
}
ENDS = {
    "first": "img_in",
    "tmlp.0": "time_embed.linear_1",
    "tmlp.2": "time_embed.linear_2",
    "tproj.1": "time_mod_proj",
    "txtmlp.1": "txt_in.linear_1",
    "txtmlp.3": "txt_in.linear_2",
    "last.linear": "final_layer.linear",
}
BLOCKS = {
    "blocks.{}": "transformer_blocks.{}",
    **{f"txtfusion.{part}.{{}}": f"text_fusion.{part}.{{}}" for part in ("layerwise_blocks", "refiner_blocks")},
}


def _norm(there: str, here: str) -> KeyRule:
    return KeyRule(there, (here,), weight_there="scale")


KREA2_LAYOUT = KeyLayout(
    [
        # A module that no other model has, so that it identifies a file.
        KeyRule("txtfusion.projector", ("text_fusion.projector",)),
        *(KeyRule(there, (here,)) for there, here in ENDS.items()),
        _norm("txtmlp.0", "txt_in.norm"),
        _norm("last.norm", "final_layer.norm"),
        KeyRule("last.modulation.lin", ("final_layer.scale_shift_table",)),
        *(KeyRule(f"{there}.{a}", (f"{here}.{b}",)) for there, here in BLOCKS.items() for a, b in LINEARS.items()),
        *(_norm(f"{there}.{a}", f"{here}.{b}") for there, here in BLOCKS.items() for a, b in NORMS.items()),
        KeyRule("blocks.{}.mod.lin", ("transformer_blocks.{}.scale_shift_table",), flat=True),
    ]
)
