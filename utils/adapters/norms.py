"""A limit for the size of a LoRA's updates, as kohya's users have it (`scale_weight_norms`).

Shapes: R rank, I inputs, O outputs of a layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import nn

from utils.adapters import kind_of
from utils.adapters.kinds import ADAPTER


class Factors(NamedTuple):
    """Of a layer's update, scale * up @ down: down (R, I, ...) and up (O, R, ...)."""

    down: torch.Tensor
    up: torch.Tensor
    scale: float

    def norm(self) -> torch.Tensor:
        """The Frobenius norm of the update, which is never made: of up @ down it is that of two matrices (R, R)."""
        down_RI, up_OR = self.down.flatten(1), self.up.flatten(1)
        square = ((up_OR.T @ up_OR) * (down_RI @ down_RI.T)).sum()
        return self.scale * square.clamp(min=0).sqrt()


def factors_in(layers: Iterable[nn.Module]) -> list[Factors]:
    """Those of the LoRAs in some layers."""
    modules = (module for layer in layers for module in layer.modules())
    return [
        Factors(module.lora_A[ADAPTER].weight, module.lora_B[ADAPTER].weight, kind_of(module).scale_of(module))
        for module in modules
        if hasattr(module, "lora_A") and kind_of(module) is not None
    ]


@torch.no_grad()
def limit_norms(factors: Sequence[Factors], limit: float) -> None:
    """Makes updates smaller whose norm is above the limit, both factors alike."""
    for one in factors:
        share = (limit / one.norm()).clamp(max=1.0).sqrt()
        one.down.mul_(share)
        one.up.mul_(share)
