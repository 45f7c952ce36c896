"""Draws are functions, not events: every random number is a pure function of what it is for.

A draw is named by (seed, purpose, anything that tells it from the others: epoch, step, sample id). The same name
gives the same numbers on every rank, at every layout, and after every resume; nothing is broadcast and no random state
is saved.
"""

from __future__ import annotations

import hashlib

import torch


def derive(seed: int, *name: object) -> int:
    """A 63-bit seed for the draw called `name` under the run's `seed`."""
    text = "\x1f".join([str(seed), *map(str, name)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def generator(seed: int, *name: object) -> torch.Generator:
    """A CPU generator for the draw called `name`."""
    return torch.Generator().manual_seed(derive(seed, *name))


def seed_devices(seed: int) -> None:
    """Seeds torch's own generators: the CPU's, and the GPUs' if they are in use.

    `torch.manual_seed` also notes, for every sort of accelerator that nobody has started, that it is to be seeded
    later, with the whole stack as a text: a layer with dropout would pay two to three milliseconds for that."""
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)


def normal(shape: tuple[int, ...], seed: int, *name: object) -> torch.Tensor:
    """Standard normal numbers in float32 on the CPU."""
    return torch.randn(shape, generator=generator(seed, *name))


def uniform(seed: int, *name: object) -> float:
    """One number in [0, 1)."""
    # A float has 53 bits: with all 63, the largest draws would round to 1.
    return (derive(seed, *name) >> 10) / 2**53


def permutation(count: int, seed: int, *name: object) -> list[int]:
    """A permutation of range(count)."""
    return torch.randperm(count, generator=generator(seed, *name)).tolist()
