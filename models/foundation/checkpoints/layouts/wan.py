"""Alibaba's names of Wan, which are also ComfyUI's."""

from __future__ import annotations

from models.foundation.checkpoints.key_layouts import KeyLayout, KeyRule

PICTURE_ATTENTION = {"k_img": "add_k_proj", "v_img": "add_v_proj", "norm_k_img": "norm_added_k"}
PICTURE_EMBEDDING = {0: "norm1", 1: "ff.net.0.proj", 3: "ff.net.2", 4: "norm2"}
ATTENTION = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0", "norm_q": "norm_q", "norm_k": "norm_k"}
PAIRS = (("self_attn", "attn1"), ("cross_attn", "attn2"))


def _block_rules(blocks: str) -> list[KeyRule]:
    """Those of a list of blocks."""
    block = f"{blocks}.{{}}"
    return [
        *(
            KeyRule(f"{block}.{there}.{part}", (f"{block}.{here}.{ours}",))
            for there, here in PAIRS
            for part, ours in ATTENTION.items()
        ),
        *(
            KeyRule(f"{block}.cross_attn.{there}", (f"{block}.attn2.{here}",))
            for there, here in PICTURE_ATTENTION.items()
        ),
        KeyRule(f"{block}.norm3", (f"{block}.norm2",)),
        KeyRule(f"{block}.ffn.0", (f"{block}.ffn.net.0.proj",)),
        KeyRule(f"{block}.ffn.2", (f"{block}.ffn.net.2",)),
        KeyRule(f"{block}.modulation", (f"{block}.scale_shift_table",)),
    ]


WAN_LAYOUT = KeyLayout(
    [
        *_block_rules("blocks"),
        *(
            KeyRule(f"img_emb.proj.{number}", (f"condition_embedder.image_embedder.{here}",))
            for number, here in PICTURE_EMBEDDING.items()
        ),
        KeyRule("img_emb.emb_pos", ("condition_embedder.image_embedder.pos_embed",)),
        KeyRule("patch_embedding", ("patch_embedding",)),
        KeyRule("time_embedding.0", ("condition_embedder.time_embedder.linear_1",)),
        KeyRule("time_embedding.2", ("condition_embedder.time_embedder.linear_2",)),
        KeyRule("time_projection.1", ("condition_embedder.time_proj",)),
        KeyRule("text_embedding.0", ("condition_embedder.text_embedder.linear_1",)),
        KeyRule("text_embedding.2", ("condition_embedder.text_embedder.linear_2",)),
        KeyRule("head.head", ("proj_out",)),
        KeyRule("head.modulation", ("scale_shift_table",)),
    ]
)
VACE_LAYOUT = KeyLayout(
    [
        *WAN_LAYOUT.rules,
        *_block_rules("vace_blocks"),
        KeyRule("vace_blocks.{}.before_proj", ("vace_blocks.{}.proj_in",)),
        KeyRule("vace_blocks.{}.after_proj", ("vace_blocks.{}.proj_out",)),
        KeyRule("vace_patch_embedding", ("vace_patch_embedding",)),
    ]
)
