"""The frozen weight of an adapted module, whatever it is kept in, and the lengths of its rows with an update.

Shapes: O outputs of a layer, I inputs, times the cells of its kernel for a convolution; R rank.
"""

from __future__ import annotations

import torch
from torch import nn

from utils.quantised.linear import QuantisedLinear


def weight_of(base: nn.Module) -> torch.Tensor:
    """A module's weight; what is quantised in the type that it had before."""
    return base.dequantised(base.dtype) if isinstance(base, QuantisedLinear) else base.weight


def shape_of(base: nn.Module) -> tuple[int, ...]:
    """The shape of a module's weight."""
    return tuple(base.shape if isinstance(base, QuantisedLinear) else base.weight.shape)


def draw_device(base: nn.Module) -> torch.device:
    """Where something large is computed of a weight before training."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else base.weight.device


@torch.no_grad()
def row_lengths(weight: torch.Tensor, down: torch.Tensor, up: torch.Tensor, scale: float) -> torch.Tensor:
    """The lengths (O) of the rows of weight + scale * up @ down, in float32.

    The sum itself, as large as the weight, is never made: |w + u|^2 = |w|^2 + 2 wu + |u|^2, of which the last two need
    products of rank R alone.
    """
    weight_OI, down_RI, up_OR = weight.flatten(1), down.flatten(1), up.flatten(1).float()
    own_O = torch.linalg.vector_norm(weight_OI, dim=1, dtype=torch.float32).square()
    across_OR = (weight_OI @ down_RI.to(weight_OI.dtype).T).float()
    within_RR = down_RI.float() @ down_RI.float().T
    both_O = 2 * scale * (across_OR * up_OR).sum(dim=1) + scale**2 * ((up_OR @ within_RR) * up_OR).sum(dim=1)
    return (own_O + both_O).clamp_min(torch.finfo(torch.float32).tiny).sqrt()
