"""Stratified quantiles: n draws, one in each n-th part of (0, 1), so that few draws meet all noise levels.

Which draw has which part is a permutation that depends on the seed alone, so each draw, taken by itself, is uniform.
"""

from __future__ import annotations

from utils.diffusion import seeds

ROUNDS = 4


def in_batch(seed: int, epoch: int, batch: int, position: int, count: int) -> float:
    """The quantile of the sample at `position` of the `count` samples of a global batch, the `batch`th of its epoch."""
    return _stratified(position, count, seed, "batch", epoch, batch)


def in_epoch(seed: int, epoch: int, position: int, count: int) -> float:
    """The quantile of the sample at `position` of the `count` samples of an epoch."""
    return _stratified(position, count, seed, "epoch", epoch)


def _stratified(position: int, count: int, seed: int, *name: object) -> float:
    stratum = permuted(position, count, seed, "timestep stratum", *name)
    return (stratum + seeds.uniform(seed, "timestep in stratum", *name, position)) / count


def permuted(position: int, count: int, seed: int, *name: object) -> int:
    """Where `position` goes in a permutation of range(count), without making all of it.

    A Feistel network permutes the smallest square of a power of two that holds the range; what falls outside the range
    is sent through again (cycle walking: Black and Rogaway 2002, "Ciphers with arbitrary finite domains").
    """
    assert 0 <= position < count, (position, count)
    bits = max(1, ((count - 1).bit_length() + 1) // 2)
    mask = (1 << bits) - 1
    value = position
    while True:
        left, right = value >> bits, value & mask
        for round_number in range(ROUNDS):
            left, right = right, left ^ (seeds.derive(seed, *name, round_number, right) & mask)
        value = left << bits | right
        if value < count:
            # Of few values the network alone is not quite even; turned by a random amount, each position is.
            return (value + seeds.derive(seed, *name, "turn")) % count
