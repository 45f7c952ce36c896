"""Subspaces of the rows of a gradient, as matrices with orthonormal rows: (matrix, rank, chance) -> (rank, rows)."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

Projection = Callable[[torch.Tensor, int, torch.Generator], torch.Tensor]


def by_singular_values(matrix: torch.Tensor, rank: int, draw: torch.Generator) -> torch.Tensor:
    """Of the largest singular values."""
    return torch.linalg.svd(matrix.float(), full_matrices=False).U[:, :rank].T.contiguous().to(matrix.dtype)


def by_norm(matrix: torch.Tensor, rank: int, draw: torch.Generator) -> torch.Tensor:
    """Of the rows with the largest norms."""
    return _selection(matrix, matrix.norm(dim=1).topk(rank).indices)


def by_chance(matrix: torch.Tensor, rank: int, draw: torch.Generator) -> torch.Tensor:
    """Of rows by chance."""
    return _selection(matrix, torch.randperm(len(matrix), generator=draw)[:rank].to(matrix.device))


def by_hadamard(matrix: torch.Tensor, rank: int, draw: torch.Generator) -> torch.Tensor:
    """Of some rows of a Hadamard matrix with columns of random sign (Tropp 2011, "Improved analysis of the subsampled
    randomized Hadamard transform"). It has as many columns as there are rows, of a power of two, and its rows are made
    orthonormal again."""
    rows = len(matrix)
    size = 1 << max(0, rows - 1).bit_length()
    chosen = torch.randperm(size, generator=draw)[:rank]
    signs = torch.randint(0, 2, (rows,), generator=draw) * 2 - 1
    # An element is -1 to the number of ones that its two places have in common.
    common = chosen[:, None] & torch.arange(rows)[None]
    for shift in (16, 8, 4, 2, 1):
        common = common ^ (common >> shift)
    transform = ((1 - 2 * (common & 1)) * signs).to(matrix.device, torch.float32)
    return torch.linalg.qr(transform.T).Q.T.contiguous().to(matrix.dtype)


def _selection(matrix: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    chosen = torch.zeros(len(places), len(matrix), dtype=matrix.dtype, device=matrix.device)
    chosen[torch.arange(len(places), device=matrix.device), places] = 1
    return chosen


PROJECTIONS: Mapping[str, Projection] = {
    "svd": by_singular_values,
    "topk": by_norm,
    "uniform": by_chance,
    "srht": by_hadamard,
}
