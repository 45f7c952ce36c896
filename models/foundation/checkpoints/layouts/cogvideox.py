"""ComfyUI's names of CogVideoX. The publisher's own files are pickled, with modulations in an order of their own."""

from __future__ import annotations

from models.foundation.checkpoints.key_layouts import KeyLayout, KeyRule

IN_BLOCK = {
    "q": "attn1.to_q",
    "k": "attn1.to_k",
    "v": "attn1.to_v",
    "norm_q": "attn1.norm_q",
    "norm_k": "attn1.norm_k",
    "attn_out": "attn1.to_out.0",
    **{f"norm{number}.{part}": f"norm{number}.{part}" for number in (1, 2) for part in ("linear", "norm")},
    "ff_proj": "ff.net.0.proj",
    "ff_out": "ff.net.2",
}
AROUND = {
    **{
        f"{name}_embedding_linear_{number}": f"{name}_embedding.linear_{number}"
        for name in ("time", "ofs")
        for number in (1, 2)
    },
    **{
        name: name
        for name in (
            "patch_embed.proj",
            "patch_embed.text_proj",
            "patch_embed.pos_embedding",
            "norm_final",
            "norm_out.linear",
            "norm_out.norm",
            "proj_out",
        )
    },
}
COGVIDEOX_LAYOUT = KeyLayout(
    [
        *(KeyRule(f"blocks.{{}}.{there}", (f"transformer_blocks.{{}}.{here}",)) for there, here in IN_BLOCK.items()),
        *(KeyRule(there, (here,)) for there, here in AROUND.items()),
    ]
)
