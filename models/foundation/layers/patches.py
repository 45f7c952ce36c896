"""Latents of pictures as sequences of tokens, each of which is a patch of 2 x 2 cells; models differ in the order of
the numbers within a token. And, of clips too, a latent that stands for a grid of tokens.

Shapes: B batch, T tokens, C numbers of a token or channels of a latent, h w latent cells.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import rearrange

PATCH = 2
SIDES = {"p": PATCH, "q": PATCH}


def pack(x_BChw: torch.Tensor) -> torch.Tensor:
    """A latent as tokens (B, T, 4C) with the channel as the outer dimension."""
    return rearrange(x_BChw, "b c (h p) (w q) -> b (h w) (c p q)", **SIDES)


def unpack(x_BTC: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """The inverse of `pack`, for a latent of `height` x `width` cells."""
    return rearrange(x_BTC, "b (h w) (c p q) -> b c (h p) (w q)", h=height // PATCH, w=width // PATCH, **SIDES)


def patchify(x_BChw: torch.Tensor) -> torch.Tensor:
    """A latent as tokens (B, T, 4C) with the cell as the outer dimension."""
    return rearrange(x_BChw, "b c (h p) (w q) -> b (h w) (p q c)", **SIDES)


def unpatchify(x_BTC: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """The inverse of `patchify`, for a latent of `height` x `width` cells."""
    return rearrange(x_BTC, "b (h w) (p q c) -> b c (h p) (w q)", h=height // PATCH, w=width // PATCH, **SIDES)


def blank_latent(canvas: torch.Tensor, patch: Sequence[int]) -> torch.Tensor:
    """A latent (1, 0, h, w) or (1, 0, f, h, w) without values, for modules that look at its size and device alone.

    Args:
        canvas: has the shape of a grid of tokens, and then 0.
        patch: the cells of a token in each direction.
    """
    return canvas.new_empty(1, 0, *(side * cells for side, cells in zip(canvas.shape[:-1], patch, strict=True)))
