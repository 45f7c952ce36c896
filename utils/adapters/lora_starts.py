"""Where a LoRA may start: in the directions of the weight itself, instead of at random ones with no effect.

PiSSA (Meng et al. 2024) starts from the largest singular values of the weight, OLoRA (Büyükakyüz 2024) from its first
directions by QR. Both take the start out of the weight, so that their sum is the weight at first. Here the weight stays
as it is, and the start is subtracted beside it, which is the same function: so the weight may be quantised or swapped.

A start depends on the weight and the rank alone, so that a run that goes on finds the same.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from utils.adapters.base_weight import draw_device, weight_of
from utils.diffusion import seeds

Start = Literal["pissa", "olora"]
WHOLE = 256
"""Weights with a side up to this are taken apart as a whole."""
FURTHER, ITERATIONS = 16, 8
"""How many more directions than asked for are followed, and how often, in larger ones."""


@torch.no_grad()
def start_of(base: nn.Module, rank: int, scale: float, start: Start) -> tuple[torch.Tensor, torch.Tensor]:
    """The factors (rank, inputs, ...) and (outputs, rank, 1, ...) in float32, on the CPU, that a start takes out of a
    weight. Directions that a small weight does not have are zeros."""
    weight = weight_of(base).detach()
    matrix_OI = weight.to(draw_device(base), torch.float32).flatten(1)
    up_OR, down_RI = (_singular if start == "pissa" else _orthogonal)(matrix_OI, min(rank, *matrix_OI.shape))
    # As PEFT has them: of PiSSA the directions themselves are trained, of OLoRA `scale` times these.
    down_RI = down_RI / scale if start == "pissa" else down_RI
    down, up = matrix_OI.new_zeros(rank, matrix_OI.shape[1]), matrix_OI.new_zeros(matrix_OI.shape[0], rank)
    down[: len(down_RI)], up[:, : up_OR.shape[1]] = down_RI, up_OR
    cells = [1] * (weight.ndim - 2)
    return down.cpu().view(rank, *weight.shape[1:]), up.cpu().view(-1, rank, *cells)


def _singular(matrix_OI: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The best product of this rank, of which both factors are equally large."""
    if min(matrix_OI.shape) <= max(WHOLE, rank + FURTHER):
        left, values, right = torch.linalg.svd(matrix_OI, full_matrices=False)
    else:
        # What it draws is the same for all weights and runs.
        with torch.random.fork_rng():
            seeds.seed_devices(seeds.derive(0, "directions"))
            left, values, right = torch.svd_lowrank(matrix_OI, q=rank + FURTHER, niter=ITERATIONS)
        right = right.T
    root = values[:rank].sqrt()
    return left[:, :rank] * root, root[:, None] * right[:rank]


def _orthogonal(matrix_OI: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The first columns of Q, and the rows of R that belong to them."""
    up_OR, _ = torch.linalg.qr(matrix_OI[:, :rank])
    return up_OR, up_OR.T @ matrix_OI
