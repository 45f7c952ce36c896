"""Stable Diffusion's UNet in layers.

A layer is one resnet with its attention, which is finer than the UNet's blocks. The skip connections travel as a stack:
layers on the way down push, layers on the way up pop.

Shapes: B batch, C channels, h w latent cells, L text tokens, D features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel
    from diffusers.models.resnet import ResnetBlock2D
    from diffusers.models.transformers.transformer_2d import Transformer2DModel

BLOCK_TYPES = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}
PLAIN_KEYS = (
    "center_input_sample",
    "class_embed_type",
    "num_class_embeds",
    "encoder_hid_dim_type",
    "encoder_hid_dim",
    "time_cond_proj_dim",
    "time_embedding_act_fn",
)
"""Keys of a UNet's configuration that only other models set."""


class UNetStream(NamedTuple):
    """What travels from layer to layer; `skips` are outputs of layers on the way down, the last one on top."""

    x_BChw: torch.Tensor
    skips: tuple[torch.Tensor, ...]
    time_BD: torch.Tensor
    text_BLD: torch.Tensor


class UNetLayer(nn.Module):
    """Some consecutive modules of a UNet.

    Args:
        pops: whether it takes the top of the stack as further channels.
        pushes: whether it pushes its result onto the stack.
    """

    recomputable = True

    def __init__(self, parts: Sequence[nn.Module], *, pops: bool = False, pushes: bool = False):
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.pops, self.pushes = pops, pushes

    def forward(self, stream: UNetStream) -> UNetStream:
        x_BChw, skips = stream.x_BChw, stream.skips
        if self.pops:
            x_BChw, skips = torch.cat([x_BChw, skips[-1]], dim=1), skips[:-1]
        for part in self.parts:
            x_BChw = _CALLS[type(part).__name__](part, x_BChw, stream)
        return stream._replace(x_BChw=x_BChw, skips=(*skips, x_BChw) if self.pushes else skips)


class UNetExit(nn.Module):
    """Projects to the latent (B, C, h, w)."""

    def __init__(self, unet: UNet2DConditionModel):
        super().__init__()
        self.conv_norm_out, self.conv_act, self.conv_out = unet.conv_norm_out, unet.conv_act, unet.conv_out

    def forward(self, stream: UNetStream) -> torch.Tensor:
        return self.conv_out(self.conv_act(self.conv_norm_out(stream.x_BChw)))


def _resample(part: nn.Module, x_BChw: torch.Tensor, stream: UNetStream) -> torch.Tensor:
    return part(x_BChw)


def _attend(part: Transformer2DModel, x_BChw: torch.Tensor, stream: UNetStream) -> torch.Tensor:
    return part(x_BChw, encoder_hidden_states=stream.text_BLD, return_dict=False)[0]


def _resnet(part: ResnetBlock2D, x_BChw: torch.Tensor, stream: UNetStream) -> torch.Tensor:
    return part(x_BChw, stream.time_BD)


_CALLS = {
    "ResnetBlock2D": _resnet,
    "Transformer2DModel": _attend,
    "Downsample2D": _resample,
    "Upsample2D": _resample,
}
"""By the names of diffusers' classes."""


def unet_layers(unet: UNet2DConditionModel) -> list[nn.Module]:
    """The layers behind the entry, which pushes the output of `conv_in`."""
    layers = []
    for block in unet.down_blocks:
        layers += [UNetLayer(parts, pushes=True) for parts in _pairs(block)]
        layers += [UNetLayer([part], pushes=True) for part in block.downsamplers or ()]
    first, *rest = unet.mid_block.resnets
    layers.append(UNetLayer([first]))
    layers += [UNetLayer(pair) for pair in zip(unet.mid_block.attentions, rest, strict=True)]
    for block in unet.up_blocks:
        layers += [UNetLayer(parts, pops=True) for parts in _pairs(block)]
        layers += [UNetLayer([part]) for part in block.upsamplers or ()]
    return [*layers, UNetExit(unet)]


def _pairs(block: nn.Module) -> list[list[nn.Module]]:
    """The resnets of a block, each with its attention if the block has any."""
    attentions = getattr(block, "attentions", None) or [None] * len(block.resnets)
    pairs = zip(block.resnets, attentions, strict=True)
    return [[resnet] if attention is None else [resnet, attention] for resnet, attention in pairs]


def unknown_variant(config: Mapping[str, Any]) -> str | None:
    """What is unknown in a UNet's configuration; None if everything is known."""
    for key, known in BLOCK_TYPES.items():
        if strange := [kind for kind in config[key] if kind not in known]:
            return f"{key} has {strange[0]}, and {' and '.join(known)} are known"
    if config.get("mid_block_type", "UNetMidBlock2DCrossAttn") != "UNetMidBlock2DCrossAttn":
        return f"mid_block_type is {config['mid_block_type']}"
    if not isinstance(config["layers_per_block"], int):
        return "layers_per_block differs from block to block"
    return next((f"{key} is {config[key]}" for key in PLAIN_KEYS if config.get(key)), None)
