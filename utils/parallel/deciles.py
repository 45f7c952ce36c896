"""The losses of a step's samples by their noise level, in tenths of the levels that are trained."""

from __future__ import annotations

from collections.abc import Sequence

import torch

DECILES = 10


class LossByDecile:
    """Sums on the device; nobody waits for it.

    Shapes: B batch, D deciles.

    Args:
        device: of the losses.
    """

    def __init__(self, device: torch.device):
        self._own_D = torch.arange(DECILES, device=device)
        # Of the losses, and of how many there are.
        self.sums_2D = torch.zeros(2, DECILES, device=device)

    def add(self, losses_B: torch.Tensor, quantile_B: torch.Tensor) -> None:
        """Counts some samples, whose noise levels are at these quantiles of all that are trained."""
        decile_B = (quantile_B * DECILES).long().clamp(0, DECILES - 1)
        is_in_BD = decile_B[:, None] == self._own_D
        # Where a loss is no number, the others' deciles stay sound.
        sums_D = torch.where(is_in_BD, losses_B.detach().float()[:, None], 0.0).sum(0)
        self.sums_2D += torch.stack([sums_D, is_in_BD.float().sum(0)])


def means(sums: Sequence[float]) -> dict[float, float]:
    """The middle of a decile -> the mean loss in it, where there are samples.

    Args:
        sums: `sums_2D`, flat.
    """
    return {
        (decile + 0.5) / DECILES: sums[decile] / sums[DECILES + decile]
        for decile in range(DECILES)
        if sums[DECILES + decile]
    }
