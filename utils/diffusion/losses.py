"""How far a prediction is from its target: one number per sample."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Labels(NamedTuple):
    """What the last stage compares its prediction with.

    Attributes:
        target: (B, ...), float32.
        weight_B: factor on each sample's loss.
    """

    target: torch.Tensor
    weight_B: torch.Tensor


def mean_squared_error(prediction: torch.Tensor, labels: Labels) -> torch.Tensor:
    """The weighted mean squared error of every sample (B,), in float32."""
    error = (prediction.float() - labels.target.float()).square()
    return error.flatten(1).mean(1) * labels.weight_B
