"""Pads sequences of tokens to multiples of a number.

Shapes: B batch, L tokens, C channels.
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
