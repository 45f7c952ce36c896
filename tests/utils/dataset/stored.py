"""Items that tests put into stores, each known by its number."""

from pathlib import Path

import torch

from utils.dataset.tensor_store import TensorStore


def item(seed: int, size: int = 64) -> dict[str, torch.Tensor]:
    return {
        "x_LD": torch.randn(size, 4, generator=torch.Generator().manual_seed(seed)),
        "n": torch.tensor(seed),
    }


def is_intact(store: TensorStore, seed: int, size: int = 64) -> bool:
    found, expected = store.get(str(seed)), item(seed, size)
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def assert_items(store: TensorStore, seeds, size: int = 64) -> None:
    assert all(is_intact(store, seed, size) for seed in seeds)


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.shard"))
