"""Names of HunyuanImage 2.1: ComfyUI's own, which it does not rename as it loads a file, and Tencent's, whose queries,
keys and values are one tensor or three."""

from __future__ import annotations

from models.foundation.checkpoints.key_layouts import KeyLayout, KeyRule
from models.foundation.checkpoints.layouts.hunyuan_video import (
    COMFYUI,
    ENDS,
    SINGLE,
    TENCENT,
    Spelling,
    TencentLayout,
    double_rules,
    embedder_rules,
    refiner_rules,
    single_rules,
)

BYT5_PARTS = {"layernorm": "norm", "fc1": "linear_1", "fc2": "linear_2", "fc3": "linear_3"}
BYT5 = [KeyRule(f"byt5_in.{there}", (f"context_embedder_2.{here}",)) for there, here in BYT5_PARTS.items()]


def apart_of(rules: list[KeyRule]) -> list[KeyRule]:
    """The rules of blocks, where what is fused in them is not. The first one is of a module without a norm, whose name
    would begin in the same way, so that it identifies a file."""
    found = []
    for rule in rules:
        if rule.there.endswith("_qkv"):
            there = [f"{rule.there.removesuffix('qkv')}{part}" for part in "qkv"]
            found[:0] = [KeyRule(*pair) for pair in list(zip(there, [(one,) for one in rule.here], strict=True))[::-1]]
        elif rule.there == f"{SINGLE[0]}.linear1":
            there = [f"{rule.there}_{part}" for part in ("q", "k", "v", "mlp")]
            found += [KeyRule(a, (b,)) for a, b in zip(there, rule.here, strict=True)]
        elif rule.there == f"{SINGLE[0]}.linear2":
            found.append(KeyRule(f"{rule.there}.fc", rule.here))
        else:
            found.append(rule)
    return found


def _layout(spelling: Spelling, *, apart: bool = False) -> KeyLayout:
    blocks = [*double_rules(spelling), *single_rules(spelling)]
    return KeyLayout(
        [
            *(apart_of(blocks) if apart else blocks),
            *refiner_rules(spelling),
            *embedder_rules(spelling, "time_in", "time_guidance_embed.timestep_embedder"),
            *BYT5,
            *ENDS,
        ]
    )


OWN = _layout(COMFYUI)
FUSED, APART = _layout(TENCENT), _layout(TENCENT, apart=True)
HUNYUAN_IMAGE_LAYOUT = TencentLayout(OWN, FUSED, APART, own=OWN)
