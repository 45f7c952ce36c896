"""Tencent's names of HunyuanVideo and of the models that follow it, and ComfyUI's own.

ComfyUI renames Tencent's files as it loads them. Checkpoints that it saves have its own names, and so must kohya's
LoRAs, since it knows no others with underscores.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from models.foundation.checkpoints.key_layouts import KeyLayout, KeyRule, Piece
from utils.adapters.kinds import Target

REFINER = ("txt_in.individual_token_refiner.blocks.{}", "context_embedder.token_refiner.refiner_blocks.{}")
DOUBLE = ("double_blocks.{}", "transformer_blocks.{}")
SINGLE = ("single_blocks.{}", "single_transformer_blocks.{}")
QKV = ("to_q", "to_k", "to_v")
ADDED = ("add_q_proj", "add_k_proj", "add_v_proj")


@dataclass(frozen=True)
class Spelling:
    """What the same modules are called by Tencent, or by ComfyUI.

    Attributes:
        qkv, out, query_norm, key_norm: of attention; the first two follow `img_attn` of a block.
        norm_weight: of the norms.
        modulation: the Linear of a modulation.
        embedder: the two Linears of an embedder of time.
        refiner: attention and the two Linears of the feed-forward of the text's refiner.
        feed_forward: the two Linears.
    """

    qkv: str
    out: str
    norms: tuple[str, str]
    single_norms: tuple[str, str]
    norm_weight: str
    modulation: str
    embedder: tuple[str, str]
    refiner: tuple[str, str, str, str]
    feed_forward: tuple[str, str]


TENCENT = Spelling(
    qkv="_qkv",
    out="_proj",
    norms=("_q_norm", "_k_norm"),
    single_norms=("q_norm", "k_norm"),
    norm_weight="weight",
    modulation="linear",
    embedder=("mlp.0", "mlp.2"),
    refiner=("self_attn_qkv", "self_attn_proj", "mlp.fc1", "mlp.fc2"),
    feed_forward=("mlp.fc1", "mlp.fc2"),
)
COMFYUI = Spelling(
    qkv=".qkv",
    out=".proj",
    norms=(".norm.query_norm", ".norm.key_norm"),
    single_norms=("norm.query_norm", "norm.key_norm"),
    norm_weight="scale",
    modulation="lin",
    embedder=("in_layer", "out_layer"),
    refiner=("self_attn.qkv", "self_attn.proj", "mlp.0", "mlp.2"),
    feed_forward=("mlp.0", "mlp.2"),
)


def _in(block: tuple[str, str], names: Mapping[str, str | Sequence[str]]) -> list[KeyRule]:
    there, here = block
    many = {a: (b,) if isinstance(b, str) else tuple(b) for a, b in names.items()}
    return [KeyRule(f"{there}.{a}", tuple(f"{here}.{part}" for part in parts)) for a, parts in many.items()]


def _norms(block: tuple[str, str], there: Sequence[str], here: Sequence[str], weight: str) -> list[KeyRule]:
    return [
        KeyRule(f"{block[0]}.{a}", (f"{block[1]}.{b}",), weight_there=weight) for a, b in zip(there, here, strict=True)
    ]


def refiner_rules(spelling: Spelling) -> list[KeyRule]:
    """Of the text's refiner. The first one is of a module that no other family has, so that it identifies a file."""
    qkv, out, *up_down = spelling.refiner
    return [
        *_in(REFINER, {qkv: [f"attn.{part}" for part in QKV], out: "attn.to_out.0"}),
        *_in(REFINER, {"norm1": "norm1", "norm2": "norm2", "adaLN_modulation.1": "norm_out.linear"}),
        *_in(REFINER, dict(zip(up_down, ("ff.net.0.proj", "ff.net.2"), strict=True))),
        KeyRule("txt_in.input_embedder", ("context_embedder.proj_in",)),
        *embedder_rules(spelling, "txt_in.t_embedder", "context_embedder.time_text_embed.timestep_embedder"),
        *_pairs(
            "txt_in.c_embedder",
            ("linear_1", "linear_2") if spelling is TENCENT else spelling.embedder,
            "context_embedder.time_text_embed.text_embedder",
        ),
    ]


def embedder_rules(spelling: Spelling, there: str, here: str) -> list[KeyRule]:
    """Of an embedder of time, or of guidance."""
    return _pairs(there, spelling.embedder, here)


def _pairs(there: str, names: Sequence[str], here: str) -> list[KeyRule]:
    return [KeyRule(f"{there}.{name}", (f"{here}.linear_{number}",)) for number, name in enumerate(names, 1)]


def double_rules(spelling: Spelling) -> list[KeyRule]:
    """Of the blocks that keep text and picture apart."""
    rules = []
    for stream, qkv, out, norms, suffix in (
        ("img", QKV, "to_out.0", ("norm_q", "norm_k"), ""),
        ("txt", ADDED, "to_add_out", ("norm_added_q", "norm_added_k"), "_context"),
    ):
        up, down = spelling.feed_forward
        rules += _in(
            DOUBLE,
            {
                f"{stream}_attn{spelling.qkv}": [f"attn.{part}" for part in qkv],
                f"{stream}_attn{spelling.out}": f"attn.{out}",
                f"{stream}_mod.{spelling.modulation}": f"norm1{suffix}.linear",
                f"{stream}_{up}": f"ff{suffix}.net.0.proj",
                f"{stream}_{down}": f"ff{suffix}.net.2",
            },
        )
        theirs = [f"{stream}_attn{name}" for name in spelling.norms]
        rules += _norms(DOUBLE, theirs, [f"attn.{name}" for name in norms], spelling.norm_weight)
    return rules


def single_rules(spelling: Spelling) -> list[KeyRule]:
    """Of the blocks in which text and picture are one sequence."""
    return [
        *_in(SINGLE, {"linear1": [*(f"attn.{part}" for part in QKV), "proj_mlp"], "linear2": "proj_out"}),
        *_in(SINGLE, {f"modulation.{spelling.modulation}": "norm.linear"}),
        *_norms(SINGLE, spelling.single_norms, ("attn.norm_q", "attn.norm_k"), spelling.norm_weight),
    ]


ENDS = [
    KeyRule("img_in.proj", ("x_embedder.proj",)),
    KeyRule("final_layer.linear", ("proj_out",)),
    KeyRule("final_layer.adaLN_modulation.1", ("norm_out.linear",), swap_halves=True),
]


class TencentLayout(KeyLayout):
    """The names of the first of some layouts, in which whole models are exported; files of the others are read too.

    Args:
        layouts: first rules identify a file.
        own: ComfyUI's, one of the layouts, in which kohya's LoRAs are written.
    """

    def __init__(self, *layouts: KeyLayout, own: KeyLayout):
        super().__init__(layouts[0].rules)
        self.layouts, self.own = layouts, own

    def prefix(self, keys: Iterable[str]) -> str | None:
        keys = list(keys)
        return next((found for one in self.layouts if (found := one.prefix(keys)) is not None), None)

    def pieces(self, shapes: Mapping[str, Sequence[int]], keys: Iterable[str]) -> dict[str, Piece]:
        keys = set(keys)
        fitting = next(one for one in self.layouts if one.recognises(keys))
        return fitting.pieces(shapes, keys)

    def targets(self, names: Iterable[str]) -> Iterator[tuple[str, Target]]:
        names, found = set(names), {}
        for layout in self.layouts:
            found |= dict(layout.targets(names))
        yield from found.items()

    def comfyui_names(self, modules: Iterable[str]) -> dict[str, str]:
        return self.own.comfyui_names(modules)

    def lora_to_kohya(self, factors: Mapping[str, torch.Tensor], *args: Any) -> dict[str, torch.Tensor]:
        return self.own.lora_to_kohya(factors, *args)

    def differences(self, *args: Any) -> dict[str, torch.Tensor]:
        return self.own.differences(*args)


def _hunyuan_video(spelling: Spelling) -> KeyLayout:
    return KeyLayout(
        [
            *refiner_rules(spelling),
            *double_rules(spelling),
            *single_rules(spelling),
            *embedder_rules(spelling, "time_in", "time_text_embed.timestep_embedder"),
            *embedder_rules(spelling, "guidance_in", "time_text_embed.guidance_embedder"),
            *_pairs("vector_in", ("in_layer", "out_layer"), "time_text_embed.text_embedder"),
            *ENDS,
        ]
    )


OWN_OF_VIDEO = _hunyuan_video(COMFYUI)
HUNYUAN_VIDEO_LAYOUT = TencentLayout(_hunyuan_video(TENCENT), OWN_OF_VIDEO, own=OWN_OF_VIDEO)
