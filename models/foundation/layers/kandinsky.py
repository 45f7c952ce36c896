"""What Kandinsky 5's layers and samples need beside the stock modules.

Shapes: B batch, C latent channels, f h w latent frames, height and width, T tokens of a picture, L text tokens,
D width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from models.foundation.layers.around_stock import AroundStock
from models.foundation.layers.padding import lengthened

MENDED, AGAINST = 4, 5
"""Latent frames of a clip from a picture that are mended after the last step, and how many behind them say how."""
MEAN_MOVES, SPREAD_MOVES = (0.05, 0.1), (0.1, 0.25)
"""How far mean and standard deviation of these may be moved, down and up."""


class OfTexts(NamedTuple):
    """What attention is told of the texts of a batch: a tensor with a dimension of their tokens, and tensors without
    elements whose shapes say how many of these are each text's own; None if all are."""

    values: torch.Tensor
    lengths: tuple[torch.Tensor, ...] | None


class OwnTextAttention(AroundStock):
    """The stock attention of texts, and of a picture to its text, for each sample with its own tokens, without the
    padding of shorter texts in a batch, for which the stock processor has no mask.
    """

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: torch.Tensor,
        encoder_hidden_states: OfTexts | None = None,
        rotary_emb: OfTexts | None = None,
        sparse_params: None = None,
    ) -> torch.Tensor:
        """Tokens of a picture (B, T, D) with the texts that they look at, or those of texts (B, L, D) with their
        angles."""
        if encoder_hidden_states is not None:
            text_BLD, lengths = encoder_hidden_states
            if lengths is None:
                return self.stock(attn, hidden_states, text_BLD)
            texts = zip(hidden_states.split(1), text_BLD.split(1), lengths, strict=True)
            return torch.cat([self.stock(attn, picture, text[:, : len(own)]) for picture, text, own in texts])
        rope, lengths = rotary_emb
        if lengths is None:
            return self.stock(attn, hidden_states, rotary_emb=rope)
        made = [
            self.stock(attn, text[:, : len(own)], rotary_emb=rope[:, : len(own)])
            for text, own in zip(hidden_states.split(1), lengths, strict=True)
        ]
        return torch.cat([lengthened(one, hidden_states.shape[1]) for one in made])


def mended(latents_BCfhw: torch.Tensor) -> torch.Tensor:
    """The latents of a clip from a picture, whose first frames are brought nearer to mean and standard deviation of
    those behind them, which would else flicker (`normalize_first_frame` of diffusers' pipeline); shorter clips, of
    which that makes nothing, as they are."""
    first, behind = latents_BCfhw[:, :, :MENDED], latents_BCfhw[:, :, MENDED : MENDED + AGAINST]
    if not behind.shape[2]:
        return latents_BCfhw
    mean, spread = (measure(first, dim=(1, 2, 3, 4), keepdim=True) for measure in (torch.mean, torch.std))
    to_mean = behind.mean().clamp(mean - MEAN_MOVES[0], mean + MEAN_MOVES[1])
    to_spread = behind.std().clamp(spread - SPREAD_MOVES[0], spread + SPREAD_MOVES[1])
    return torch.cat([(first - mean) / spread * to_spread + to_mean, latents_BCfhw[:, :, MENDED:]], dim=2)
