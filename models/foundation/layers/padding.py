"""Pads sequences of tokens to multiples of a number, and masks padding.

Shapes: B batch, L tokens, C channels, S tokens of a sequence that text ends.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch.nn import functional

Length = TypeVar("Length", int, torch.Tensor)


def filled_length(length: Length, multiple: int) -> Length:
    """The next multiple of a number at or above a length, or above each of a tensor of lengths."""
    return length + -length % multiple


def lengthened(row_BLC: torch.Tensor, length: int) -> torch.Tensor:
    """The sequence padded with zeros at its end to `length` tokens."""
    return functional.pad(row_BLC, (0, 0, 0, length - row_BLC.shape[1]))


def without(rows_BLC: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """The sequence without what is in [start, stop), such as the padding of a text before a picture."""
    return torch.cat([rows_BLC[:, :start], rows_BLC[:, stop:]], dim=1)


def mask_behind(text_mask_BL: torch.Tensor, tokens: int) -> torch.Tensor:
    """The mask (B, 1, 1, S) of attention in a sequence of `tokens` tokens, all of which are seen, and of the text
    behind them."""
    mask_BS = functional.pad(text_mask_BL, (tokens, 0), value=True)
    return mask_BS[:, None, None]


def seen_first(*masks_BL: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The places, among several texts one after the other, of the tokens in the order in which they are seen: those
    that the masks leave in, then padding up to the longest of the batch; and their mask, None if there is no padding.
    """
    all_BL = torch.cat(masks_BL, dim=1)
    order_BL = torch.argsort(~all_BL, dim=1, stable=True)[:, : all_BL.sum(1).max()]
    mask_BL = all_BL.gather(1, order_BL)
    # With a mask, even of ones, attention is slower.
    return order_BL, None if mask_BL.all() else mask_BL
