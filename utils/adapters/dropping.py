"""What an update does without in a training step, to train the rest more evenly."""

from __future__ import annotations

import torch


def keeps(share: float, x: torch.Tensor) -> torch.Tensor:
    """1, or in this share of the calls 0, in the type of `x`. A factor, since a branch would wait for the device."""
    return (torch.rand((), device=x.device) >= share).to(x.dtype)
