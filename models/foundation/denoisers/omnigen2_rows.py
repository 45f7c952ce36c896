"""What stands in a row of OmniGen2, and where: text, then reference pictures, then the picture that is made.

Shapes: B batch, R references of a sample at most, T tokens of a picture or of the largest reference, L text tokens, C
channels of a latent or numbers of a token, E rotary frequencies, h w latent cells.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from einops import rearrange

ROTARY_BASE = 10000.0
References = Sequence[Sequence[torch.Tensor]]
"""For each sample its references, each (C, h, w)."""
Grid = tuple[int, int]
"""Rows and columns of tokens."""


def tokens_of(x_BChw: torch.Tensor, patch: int) -> torch.Tensor:
    """A latent as tokens (B, T, C), of which each is a patch of cells, the channel innermost."""
    return rearrange(x_BChw, "b c (h p) (w q) -> b (h w) (p q c)", p=patch, q=patch)


def latent_of(x_BTC: torch.Tensor, height: int, width: int, patch: int) -> torch.Tensor:
    """The inverse of `tokens_of`, for a latent of `height` x `width` cells."""
    return rearrange(x_BTC, "b (h w) (p q c) -> b c (h p) (w q)", h=height // patch, w=width // patch, p=patch, q=patch)


def grid_of(latent: torch.Tensor, patch: int) -> Grid:
    """The grid of tokens of a latent (..., h, w)."""
    height, width = latent.shape[-2:]
    return height // patch, width // patch


def reference_tokens(references: References, patch: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens (B, R, T, C) of references, of which at least one exists, and which of them are there, bool (B, R, T);
    the others are zero."""
    rows = [[tokens_of(one[None], patch)[0] for one in own] for own in references]
    some = next(row_TC for own in rows for row_TC in own)
    most, longest = max(map(len, rows)), max(len(row_TC) for own in rows for row_TC in own)
    x_BRTC = some.new_zeros(len(rows), most, longest, some.shape[1])
    mask_BRT = torch.zeros(x_BRTC.shape[:3], dtype=torch.bool, device=some.device)
    for sample, own in enumerate(rows):
        for number, row_TC in enumerate(own):
            x_BRTC[sample, number, : len(row_TC)] = row_TC
            mask_BRT[sample, number, : len(row_TC)] = True
    return x_BRTC, mask_BRT


class Positions(NamedTuple):
    """(place in the row, row, column) of every token, int64; those of padding are zero, those of padded text count
    on. `reference_BRT3` is None if there are no references."""

    text_BL3: torch.Tensor
    reference_BRT3: torch.Tensor | None
    picture_BT3: torch.Tensor


def positions(longest: int, text_lengths: Sequence[int], references: Sequence[Sequence[Grid]], grid: Grid) -> Positions:
    """Text tokens count up; a picture has one place, the next one after the text or after as many as the longer side of
    the reference before it has tokens.

    Args:
        longest: L.
        text_lengths: of each sample, without padding.
        references: the grids of each sample's references.
        grid: of the picture that is made.
    """
    text_BL3 = torch.arange(longest)[None, :, None].expand(len(text_lengths), -1, 3)
    most = max(map(len, references))
    tokens = max([rows * columns for own in references for rows, columns in own], default=0)
    reference_BRT3 = torch.zeros(len(references), most, tokens, 3, dtype=torch.int64)
    pictures = []
    for sample, (place, own) in enumerate(zip(text_lengths, references, strict=True)):
        for number, one in enumerate(own):
            positions_T3 = _grid_positions(place, one)
            reference_BRT3[sample, number, : len(positions_T3)] = positions_T3
            place += max(one)
        pictures.append(_grid_positions(place, grid))
    return Positions(text_BL3, reference_BRT3 if most else None, torch.stack(pictures))


def _grid_positions(place: int, grid: Grid) -> torch.Tensor:
    """(place, row, column) of the tokens of a picture (T, 3), row by row."""
    return torch.cartesian_prod(torch.tensor([place]), *(torch.arange(side) for side in grid))


def rotary_table(positions: torch.Tensor, axes: Sequence[int]) -> torch.Tensor:
    """exp(i angle) of tokens at positions (..., 3), complex64 (..., E).

    Args:
        axes: the number of channels that turn by each component of a position. Pair j of w channels turns by the
            position times 10000^(-2j / w).
    """
    angles = [
        positions[..., axis, None] * ROTARY_BASE ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
        for axis, width in enumerate(axes)
    ]
    angle = torch.cat(angles, dim=-1)
    return torch.polar(torch.ones_like(angle), angle).to(torch.complex64)
