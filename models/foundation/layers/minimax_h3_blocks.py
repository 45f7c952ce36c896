"""What MiniMax-H3's blocks have in place of a part of the stock ones.

Shapes: R times, D width.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional


class Modulation(nn.Module):
    """The stock modulation of a block, for a Linear that may be quantised: the stock one asks for the type of its
    weight, which is that of the codes then."""

    def __init__(self, stock: nn.Module):
        super().__init__()
        self.linear, self.width = stock.linear, stock.hidden_size

    def forward(self, time_RD: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Six tables with a row for each time and kind."""
        rows = self.linear(functional.silu(time_RD).to(self.linear.bias.dtype))
        return rows.view(-1, 6 * self.width).chunk(6, dim=-1)
