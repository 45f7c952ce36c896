"""Names of HunyuanVideo 1.5: Tencent's, whose queries, keys and values are three tensors in its own files and one in
those for ComfyUI, and ComfyUI's own."""

from __future__ import annotations

from models.foundation.checkpoints.key_layouts import KeyLayout, KeyRule
from models.foundation.checkpoints.layouts.hunyuan_image import BYT5, apart_of
from models.foundation.checkpoints.layouts.hunyuan_video import (
    COMFYUI,
    ENDS,
    TENCENT,
    Spelling,
    TencentLayout,
    double_rules,
    embedder_rules,
    refiner_rules,
)

VISION = {"0": "norm_in", "1": "linear_1", "3": "linear_2", "4": "norm_out"}


def _layout(spelling: Spelling, *, apart: bool = False) -> KeyLayout:
    blocks = double_rules(spelling)
    return KeyLayout(
        [
            *(apart_of(blocks) if apart else blocks),
            *refiner_rules(spelling),
            *embedder_rules(spelling, "time_in", "time_embed.timestep_embedder"),
            *BYT5,
            *(KeyRule(f"vision_in.proj.{there}", (f"image_embedder.{here}",)) for there, here in VISION.items()),
            KeyRule("cond_type_embedding", ("cond_type_embed",)),
            *ENDS,
        ]
    )


OWN = _layout(COMFYUI)
FUSED, APART = _layout(TENCENT), _layout(TENCENT, apart=True)
# ComfyUI reads no file in which they are three tensors.
HUNYUAN_VIDEO_15_LAYOUT = TencentLayout(FUSED, OWN, APART, own=OWN)
