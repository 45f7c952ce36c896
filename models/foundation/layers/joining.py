"""Text and picture in one sequence, for denoisers whose first blocks keep them apart and whose later ones do not.

Such a stream has `x_BTD` and `text_BLD`. Once they are joined, the text precedes the picture in `x_BTD`, and `text_BLD`
has no elements: its shape still gives the number of tokens.

Shapes: B batch, T image tokens, L text tokens, D width.
"""

from __future__ import annotations

from typing import Any

import torch

from models.foundation.layers.chain import Middle


def joined(stream: Any) -> Any:
    """The stream with text and picture in one sequence; as it is, if they are."""
    text_BLD = stream.text_BLD
    if not text_BLD.numel():
        return stream
    return stream._replace(
        x_BTD=torch.cat([text_BLD, stream.x_BTD], dim=1), text_BLD=text_BLD.new_empty(*text_BLD.shape[:2], 0)
    )


def picture_of(stream: Any) -> torch.Tensor:
    """The picture's part of a joined sequence (B, T, D)."""
    return stream.x_BTD[:, stream.text_BLD.shape[1] :]


class JoinedMiddle(Middle):
    """A block of a plain chain that takes text and picture in one sequence."""

    def forward(self, stream: Any) -> Any:
        return super().forward(joined(stream))
