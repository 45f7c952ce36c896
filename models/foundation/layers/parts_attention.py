"""Attention within the parts of a sequence, for models whose samples are one sequence, one after the other.

Shapes: P tokens of the sequence, D width, E rotary angles.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from models.foundation.layers.around_stock import AroundStock


class Places(NamedTuple):
    """What attention is told of its sequence: the angles of tokens, if these have places, and the parts within which
    they see each other, as tensors of these lengths."""

    rope_PE: tuple[torch.Tensor, torch.Tensor] | None
    parts: tuple[torch.Tensor, ...]


class PartsAttention(AroundStock):
    """The stock attention within each part of a sequence."""

    def __call__(
        self, attn: nn.Module, hidden_states: torch.Tensor, rotary_emb: Places, attention_mask: None = None
    ) -> torch.Tensor:
        """A sequence (1, P, D)."""
        lengths = [len(part) for part in rotary_emb.parts]
        ropes = [None] * len(lengths)
        if rotary_emb.rope_PE is not None:
            ropes = zip(*(table.split(lengths) for table in rotary_emb.rope_PE), strict=True)
        parts = zip(hidden_states.split(lengths, dim=1), ropes, strict=True)
        # Of no tokens some kernels make nothing.
        return torch.cat([self.stock(attn, part, rope, None) if part.shape[1] else part for part, rope in parts], dim=1)
