"""Pairs of factors of a low rank: put together, made smaller, or made of whole differences.

Shapes: R rank, I inputs, O outputs of a layer; a convolution has further dimensions, its kernel, after I.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from utils.adapters.kinds import Update
from utils.adapters.lora_factors import LowRankUpdate


class Pair(NamedTuple):
    """Both factors of an update, whose product it is: `down` (R, I, ...) and `up` (O, R, 1, ...)."""

    down: torch.Tensor
    up: torch.Tensor


class Smaller(NamedTuple):
    """A pair of a lower rank, and the squares of the singular values that it has and that were there."""

    pair: Pair
    kept: float
    whole: float


@dataclass(frozen=True)
class Cut:
    """How many singular values are kept: at most `rank`, and no more than have `energy` of the sum of squares of all;
    None for no limit."""

    rank: int | None = None
    energy: float | None = None

    def count(self, values_R: torch.Tensor) -> int:
        """Of these singular values, which fall; at least one."""
        squares_R = values_R.double() ** 2
        limits = [len(values_R)]
        if self.rank is not None:
            limits.append(self.rank)
        if self.energy is not None and squares_R.sum() > 0:
            shares_R = squares_R.cumsum(0) / squares_R.sum()
            limits.append(int((shares_R < self.energy - 1e-12).sum()) + 1)
        return max(1, min(limits))


def joined(updates: Sequence[tuple[LowRankUpdate, float]]) -> Pair:
    """The sum of updates with weights, exactly, as one of the sum of their ranks."""
    down = torch.cat([update.down.float() for update, _ in updates])
    return Pair(down, torch.cat([update.up.float() * weight for update, weight in updates], dim=1))


def smaller(pair: Pair, cut: Cut) -> Smaller:
    """The nearest pair of a lower rank, without the product of the factors, which may be large."""
    up_OR, down_RI = pair.up.flatten(1).double(), pair.down.flatten(1).double()
    left, left_R = torch.linalg.qr(up_OR)
    right, right_R = torch.linalg.qr(down_RI.T)
    u, values_R, v = torch.linalg.svd(left_R @ right_R.T, full_matrices=False)
    shape = (len(up_OR), *pair.down.shape[1:])
    return _cut(left @ u, values_R, v @ right.T, shape, cut)


def of_difference(difference: torch.Tensor, cut: Cut) -> Smaller:
    """The nearest pair of a low rank to a whole difference (O, I, ...).

    By the eigenvectors of the smaller of its two products with itself, in float64, which takes a small part of the time
    of a singular value decomposition; what it does not resolve are values below 1e-8 of the largest. A GPU does it if
    there is one.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    whole = difference.flatten(1).to(device).double()
    is_tall = whole.shape[0] > whole.shape[1]
    flat = whole.T if is_tall else whole
    squares_R, vectors = torch.linalg.eigh(flat @ flat.T)
    values_R, vectors = squares_R.clamp_min(0).sqrt().flip(0), vectors.flip(1)
    others = (vectors.T @ flat) / values_R.clamp_min(torch.finfo(torch.float64).tiny)[:, None]
    u, v = (others.T, vectors.T) if is_tall else (vectors, others)
    return _cut(u.cpu(), values_R.cpu(), v.cpu(), tuple(difference.shape), cut)


def of_updates(updates: Sequence[tuple[Update, float]], base: torch.Tensor | None, cut: Cut) -> Smaller:
    """The nearest pair to the sum of updates with weights.

    Args:
        base: the weight (O, I, ...) in float32; None if all updates are of low ranks.
    """
    if base is None:
        return smaller(joined(updates), cut)
    return of_difference(sum(update.delta(base).cpu() * weight for update, weight in updates), cut)


def _cut(u: torch.Tensor, values_R: torch.Tensor, v: torch.Tensor, shape: tuple[int, ...], cut: Cut) -> Smaller:
    rank = cut.count(values_R)
    # Half of each value in either factor, so that both are of one size, and 16 bits lose as little of each.
    root_R = values_R[:rank].sqrt()
    down = (root_R[:, None] * v[:rank]).float().view(rank, *shape[1:])
    up = (u[:, :rank] * root_R).float().view(shape[0], rank, *[1] * (len(shape) - 2))
    squares_R = values_R.double() ** 2
    return Smaller(Pair(down.contiguous(), up.contiguous()), squares_R[:rank].sum().item(), squares_R.sum().item())
