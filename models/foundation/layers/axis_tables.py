"""Rotary tables that are looked up by position.

Shapes: B batch, T tokens, A axes, N positions, E rotary frequencies.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn


class AxisTables(nn.Module):
    """Puts side by side what each axis has at a token's position.

    Args:
        tables: exp(i angle) of each axis (N, E of the axis), computed on the CPU whatever device reads them.
    """

    def __init__(self, tables: Sequence[torch.Tensor]):
        super().__init__()
        for axis, table in enumerate(tables):
            self.register_buffer(f"axis_{axis}", table, persistent=False)

    def forward(self, positions_BTA: torch.Tensor) -> torch.Tensor:
        """Complex (B, T, E) of integer positions; -1 is the last one of the tables."""
        return torch.cat([table[positions_BTA[..., axis]] for axis, table in enumerate(self.buffers())], dim=-1)
