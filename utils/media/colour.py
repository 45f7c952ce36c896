"""Colour jitter: one linear map of colours, the same for every pixel of every frame, so that a clip cannot flicker.

Shapes: C channels (RGB), F frames, H height, W width. Pixels are float32 in [-1, 1].
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

# YIQ, of NTSC: luma, with the weights by which Pillow turns RGB to grey, and two axes of colour around it. Their
# weights sum to zero, so that grey has no colour.
RGB_TO_YIQ = ((0.299, 0.587, 0.114), (0.5959, -0.2746, -0.3213), (0.2115, -0.5227, 0.3112))


@dataclass(frozen=True)
class Jitter:
    """Factors by which light, distance from mid-grey and distance from grey of the same luma are multiplied, 1 for no
    change; `hue` is a part of a turn around the axis of grey, 0 for no change. Applied in this order."""

    brightness: float = 1.0
    contrast: float = 1.0
    saturation: float = 1.0
    hue: float = 0.0


def jittered(pixels_CFHW: torch.Tensor, jitter: Jitter) -> torch.Tensor:
    """The pixels in other colours; what leaves [-1, 1] is clipped at the end, once."""
    if jitter == Jitter():
        return pixels_CFHW
    # Mid-grey rather than the mean of the picture, which differs from frame to frame.
    scale, shift = jitter.contrast * jitter.brightness, jitter.contrast * (jitter.brightness - 1)
    matrix = (_turn(jitter) * scale).to(pixels_CFHW)
    return torch.einsum("dc,cfhw->dfhw", matrix, pixels_CFHW).add_(shift).clamp_(-1, 1)


def _turn(jitter: Jitter) -> torch.Tensor:
    """Saturation and hue as a 3x3 matrix on RGB; it leaves greys as they are."""
    to_yiq = torch.tensor(RGB_TO_YIQ, dtype=torch.float64)
    cosine, sine = (jitter.saturation * f(2 * math.pi * jitter.hue) for f in (math.cos, math.sin))
    turn = torch.tensor([[1, 0, 0], [0, cosine, sine], [0, -sine, cosine]], dtype=torch.float64)
    return torch.linalg.inv(to_yiq) @ turn @ to_yiq
