"""Mochi's VAE as an encoder for the cache, and as a decoder for samples: its latents are (z - mean) scale / std.

Shapes: B batch, C channels, F frames, H W pixels, f h w latent cells.
"""

from __future__ import annotations

import math
import re
from typing import Any

import torch

from models.foundation.encoders.vae import Family, Tensors
from models.foundation.encoders.video_vae import WanAutoencoder

KEYS = (
    "latent_channels",
    "latents_mean",
    "latents_std",
    "layers_per_block",
    "scaling_factor",
    "spatial_expansions",
    "temporal_expansions",
)
IN_LAYER = {
    "stack.0": "resnets.{}.norm1.norm_layer",
    "stack.2": "resnets.{}.conv1.conv",
    "stack.3": "resnets.{}.norm2.norm_layer",
    "stack.5": "resnets.{}.conv2.conv",
    "attn_block.norm": "norms.{}.norm_layer",
    "attn_block.attn.out": "attentions.{}.to_out.0",
}
"""What a layer has in the publisher's files -> in diffusers', by the number of the layer in its block."""
FUSED = "attn_block.attn.qkv"
ENDS = {"output_norm": "norm_out.norm_layer", "output_proj": "proj_out"}
LAYER = re.compile(
    r"(encoder\.layers|decoder\.blocks)\.(\d+)\.(?:(layers|blocks)\.)?(?:(\d+)\.)?(?:(.+)\.)?(weight|bias)"
)


def _from_genmo(tensors: Tensors, config: dict[str, Any]) -> Tensors:
    """Tensors with the names of ComfyUI's file, which are the publisher's behind `encoder.` and `decoder.`, under
    diffusers' names; others as they are."""
    renamed = {}
    for name, tensor in tensors.items():
        if found := LAYER.fullmatch(name):
            side, outer, inner, number, part, parameter = found.groups()
            of = _encoder_place if side.startswith("encoder") else _decoder_place
            block, layer = of(int(outer), inner, None if number is None else int(number), config)
            for place, rows in _parts(part or "", layer, tensor).items():
                renamed[".".join(filter(None, (side.split(".")[0], block, place, parameter)))] = rows
        else:
            for there, here in ENDS.items():
                name = name.replace(f"coder.{there}.", f"coder.{here}.")
            renamed[name] = tensor
    return renamed


def _encoder_place(outer: int, inner: str | None, number: int | None, config: dict[str, Any]) -> tuple[str, int | None]:
    """The block, and the number of the layer in it, of a name `encoder.layers.OUTER(.layers.NUMBER)`."""
    first, downs = config["layers_per_block"][0], len(config["spatial_expansions"])
    if outer == 0:
        return "proj_in", None
    if outer <= first:
        return "block_in", outer - 1
    if inner is None:
        return "block_out", outer - 1 - first - downs
    block = f"down_blocks.{outer - 1 - first}"
    return (f"{block}.conv_in.conv", None) if number == 0 else (block, number - 1)


def _decoder_place(outer: int, inner: str | None, number: int | None, config: dict[str, Any]) -> tuple[str, int | None]:
    """The same of a name `decoder.blocks.OUTER(.blocks).NUMBER`, or `decoder.blocks.OUTER.proj`."""
    if outer == 0:
        return ("conv_in", None) if number == 0 else ("block_in", number - 1)
    if inner is None and number is not None:
        return "block_out", number
    return f"up_blocks.{outer - 1}", number


def _parts(part: str, layer: int | None, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """The parts of a block's tensor by their places in the block."""
    if part == FUSED:
        return {f"attentions.{layer}.to_{one}": rows for one, rows in zip("qkv", tensor.chunk(3), strict=True)}
    return {IN_LAYER.get(part, part).format(layer): tensor}


MOCHI = Family("AutoencoderKLMochi", KEYS, ".resnets.", _from_genmo)


def compression_of(config: dict[str, Any]) -> tuple[int, int]:
    """How many pixels of a side, and how many frames after the first, a latent cell covers."""
    return math.prod(config["spatial_expansions"]), math.prod(config["temporal_expansions"])


def mochi_latent_size(config: dict[str, Any], width: int, height: int, frames: int) -> tuple[int, int, int, int]:
    """The shape (C, f, h, w) of a latent: its first frame is the clip's, each of the others covers several."""
    cell, group = compression_of(config)
    return config["latent_channels"], (frames - 1) // group + 1, height // cell, width // cell


class MochiAutoencoder(WanAutoencoder):
    """Mochi's VAE as an `Encoder`: pixels of pictures and clips -> latents (z - mean) scale / std, per channel. Its
    encoder takes a clip in one piece, as its attention sees all frames."""

    family, latent_size = MOCHI, staticmethod(mochi_latent_size)

    def _statistics(self, frames: int) -> tuple[torch.Tensor, torch.Tensor]:
        mean, std = super()._statistics(frames)
        return mean, std / self.vae.config.scaling_factor
