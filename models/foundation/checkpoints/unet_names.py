"""Names of Stable Diffusion's UNet in its publisher's files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from models.foundation.checkpoints.key_layouts import KeyLayout, KeyRule

RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
IN_TRANSFORMER = (
    *(f"attn{number}.{part}" for number in (1, 2) for part in ("to_q", "to_k", "to_v", "to_out.0")),
    *("norm1", "norm2", "norm3", "ff.net.0.proj", "ff.net.2"),
)
ATTENTION = {
    name: name
    for name in ("norm", "proj_in", "proj_out", *(f"transformer_blocks.{{}}.{part}" for part in IN_TRANSFORMER))
}
AROUND = {
    "input_blocks.0.0": "conv_in",
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}


def unet_layout(config: Mapping[str, Any]) -> KeyLayout:
    """The names in original checkpoints, which count resnets where diffusers counts blocks."""
    pairs = [*AROUND.items()]
    for there, here, leaves in _modules(config):
        pairs += [(f"{there}.{name}", f"{here}.{ours}") for name, ours in leaves.items()]
    return KeyLayout([KeyRule(there, (here,)) for there, here in pairs])


def _modules(config: Mapping[str, Any]) -> Iterator[tuple[str, str, Mapping[str, str]]]:
    """(module there, module here, modules within it) of all resnets, attentions and changes of size."""
    per_block, down, up = config["layers_per_block"], config["down_block_types"], config["up_block_types"]
    for block, kind in enumerate(down):
        first = 1 + block * (per_block + 1)
        for number in range(per_block):
            there, here = f"input_blocks.{first + number}", f"down_blocks.{block}"
            yield f"{there}.0", f"{here}.resnets.{number}", RESNET
            if kind.startswith("CrossAttn"):
                yield f"{there}.1", f"{here}.attentions.{number}", ATTENTION
        if block < len(down) - 1:
            yield f"input_blocks.{first + per_block}.0", f"down_blocks.{block}.downsamplers.0", {"op": "conv"}
    yield "middle_block.0", "mid_block.resnets.0", RESNET
    yield "middle_block.1", "mid_block.attentions.0", ATTENTION
    yield "middle_block.2", "mid_block.resnets.1", RESNET
    for block, kind in enumerate(up):
        attends = kind.startswith("CrossAttn")
        for number in range(per_block + 1):
            there, here = f"output_blocks.{block * (per_block + 1) + number}", f"up_blocks.{block}"
            yield f"{there}.0", f"{here}.resnets.{number}", RESNET
            if attends:
                yield f"{there}.1", f"{here}.attentions.{number}", ATTENTION
            if number == per_block and block < len(up) - 1:
                yield f"{there}.{2 if attends else 1}", f"{here}.upsamplers.0", {"conv": "conv"}
