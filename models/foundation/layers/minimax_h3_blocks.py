"""What goes through MiniMax-H3's blocks, and what these have in place of a part of the stock ones.

Shapes: U text tokens and P tokens of the sequence of all samples, of which W are noisy ones of video, R times, D width,
E rotary angles, f h w latent frames, height and width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional

from models.foundation.layers.parts_attention import Places


class MiniMaxH3Stream(NamedTuple):
    """What travels from layer to layer. Where the texts come into the sequence is empty until they are refined, and
    with that their fields end. `modulation_P` is the row of each token in a table of modulations, which has one for
    each time and kind."""

    x_1PD: torch.Tensor
    text_1UD: torch.Tensor | None
    text_U: torch.Tensor | None
    texts: tuple[torch.Tensor, ...] | None
    time_RD: torch.Tensor
    modulation_P: torch.Tensor
    time_P: torch.Tensor
    positions_P3: torch.Tensor
    rope_PE: tuple[torch.Tensor, torch.Tensor]
    noisy_W: torch.Tensor
    parts: tuple[torch.Tensor, ...]
    canvas_fhw0: torch.Tensor

    @property
    def places(self) -> Places:
        """What attention is told."""
        return Places(self.rope_PE, self.parts)


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


class Refined(nn.Module):
    """A block of the refiner, for each text by itself. The last one, which has the refiner's norm, puts the texts into
    the sequence."""

    recomputable = True

    def __init__(self, block: nn.Module, norm: nn.Module | None):
        super().__init__()
        self.block, self.norm = block, norm

    def forward(self, stream: MiniMaxH3Stream) -> MiniMaxH3Stream:
        block = self.block
        text_1UD = stream.text_1UD + block.attn(block.norm1(stream.text_1UD), Places(None, stream.texts))
        text_1UD = text_1UD + block.ff(block.norm2(text_1UD))
        if self.norm is None:
            return stream._replace(text_1UD=text_1UD)
        x_1PD = stream.x_1PD.index_copy(1, stream.text_U, self.norm(text_1UD))
        return stream._replace(x_1PD=x_1PD, text_1UD=None, text_U=None, texts=None)
