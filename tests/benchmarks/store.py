"""The cache's store: random reads, writes, checking, freeing, and a million items.

Items are 128 KB, one latent of Flux at 1024 x 1024 in bfloat16. Reads come in random order from a warm page cache, and
are compared with copies of the same bytes out of a memory map, and with a store of `torch.save` blobs in one open file
with an SQLite index. Writes are compared with a plain file that is written in one go, brought to disk as often. One
thread; the contestants take turns, and the median of their rounds counts.
"""

from __future__ import annotations

import gc
import io
import os
import random
import shutil
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from tests.benchmarks.setting import ROOT
from utils.dataset.store_index import Extent, StoreIndex
from utils.dataset.tensor_store import FLUSH_BYTES, TensorStore

ITEMS, ROUNDS = 4096, 7
WRITE_ROUNDS = 5
SHAPE_CHW = (16, 64, 64)
ITEM_BYTES = 2**17
MILLION = 1_000_000
REAL_ITEMS = 1000
MEGABYTE = 1e6


def measure() -> Iterator[str]:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        yield from _writes(folder)
        yield from _reads(folder)
        yield from _freeing(folder / "store")
        shutil.rmtree(folder / "store")
        yield from _million(folder / "million")


def _writes(folder: Path) -> Iterator[str]:
    latents = [torch.randn(SHAPE_CHW).bfloat16() for _ in range(64)]
    contents = [latent.view(torch.uint8).numpy().tobytes() for latent in latents]

    def clear() -> None:
        shutil.rmtree(folder / "store", ignore_errors=True)
        (folder / "plain").unlink(missing_ok=True)
        os.sync()

    def store() -> None:
        with TensorStore(folder / "store", "bench") as opened:
            for number in range(ITEMS):
                opened.put(_key(number), {"latents": latents[number % len(latents)]})

    def plain() -> None:
        with (folder / "plain").open("wb", buffering=0) as file:
            for number in range(ITEMS):
                file.write(contents[number % len(contents)])
                if (number + 1) * ITEM_BYTES % FLUSH_BYTES == 0:
                    os.fsync(file.fileno())

    seconds = _median_seconds({"store": store, "plain": plain}, WRITE_ROUNDS, clear)
    store()
    for name in ("plain", "store"):
        yield f"write, {name}: {_speed(seconds[name])} ({seconds['plain'] / seconds[name]:.2f} of a plain write)"


def _reads(folder: Path) -> Iterator[str]:
    order = random.Random(0).sample(range(ITEMS), ITEMS)
    keys = [_key(number) for number in order]
    (shard,) = (folder / "store").glob("*.shard")
    bytes_N = np.memmap(shard, mode="r")
    length = len(bytes_N) // ITEMS
    blobs = _Blobs(folder / "blobs")
    with TensorStore(folder / "store") as store:
        for number in range(ITEMS):
            blobs.put(_key(number), store.get(_key(number)))
        store.close()
    blobs.commit()
    first = []
    for _ in range(ROUNDS):
        with TensorStore(folder / "store") as store:
            started = time.perf_counter()
            _each(store.get, keys)
            first.append(time.perf_counter() - started)
    with TensorStore(folder / "store") as store:
        contestants = {
            "memory map": lambda: _each(lambda number: bytes_N[number * length : (number + 1) * length].copy(), order),
            "torch.save + SQLite": lambda: _each(blobs.get, keys),
            "store": lambda: _each(store.get, keys),
        }
        for run in contestants.values():
            run()
        seconds = _median_seconds(contestants, ROUNDS)
        seconds["store, first read"] = statistics.median(first)
        for name, taken in seconds.items():
            of_map, of_blobs = seconds["memory map"] / taken, seconds["torch.save + SQLite"] / taken
            ratios = f"{of_map:.2f} of the map, {of_blobs:.1f} of torch.save"
            yield f"read, {name}: {taken / ITEMS * 1e6:.1f} us, {_speed(taken)} ({ratios})"
        started = time.perf_counter()
        damaged = store.verify(keys)
        yield f"verify: {_speed(time.perf_counter() - started)}"
        assert not damaged
    blobs.close()


def _freeing(folder: Path) -> Iterator[str]:
    with TensorStore(folder, "bench") as store:
        store.delete(_key(number) for number in range(ITEMS) if number % 5 < 3)
        before = store.stats()
        started = time.perf_counter()
        freed = store.compact()
        seconds = time.perf_counter() - started
        yield f"compact: {freed / MEGABYTE:.0f} MB of {before.bytes / MEGABYTE:.0f} MB freed in {seconds:.2f} s"


def _million(folder: Path) -> Iterator[str]:
    """A million rows over a few real items; looked at by a process that has not seen them."""
    with TensorStore(folder, "bench", shard_bytes=2**26) as store:
        for number in range(REAL_ITEMS):
            store.put(_key(number), {"latents": torch.zeros(SHAPE_CHW, dtype=torch.bfloat16)})
    index = StoreIndex(folder)
    real: list[Extent] = [index.extent(_key(number)) for number in range(REAL_ITEMS)]
    index.add({_key(number): real[number % REAL_ITEMS] for number in range(MILLION)})
    index.close()
    command = [sys.executable, "-m", "tests.benchmarks.store", str(folder)]
    yield from subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()


def look(folder: Path) -> Iterator[str]:
    """Opens a store of a million items and asks it for things."""
    torch.set_num_threads(1)
    keys = [_key(number) for number in range(MILLION // 2, MILLION + MILLION // 2)]
    gc.collect()
    before = _megabytes("VmRSS")
    started = time.perf_counter()
    with TensorStore(folder, "bench") as store:
        item = store.get(_key(MILLION - 1))
        seconds = time.perf_counter() - started
        yield f"a million items: opened and one read in {seconds:.3f} s, {_megabytes('VmRSS') - before:.0f} MB"
        assert item["latents"].shape == SHAPE_CHW
        for name, ask in {
            "missing(1,000,000 keys)": lambda: store.missing(keys),
            "keys()": store.keys,
            "stats()": store.stats,
            "get of each": lambda: _each(store.get, keys[: MILLION // 2]),
        }.items():
            started = time.perf_counter()
            ask()
            yield f"{name}: {time.perf_counter() - started:.1f} s; then {_megabytes('VmRSS') - before:.0f} MB"
    yield f"the whole process: {before:.0f} MB before the opening, {_megabytes('VmHWM'):.0f} MB at most"


class _Blobs:
    """The store to compare with."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("w+b")
        self._index = sqlite3.connect(path.with_suffix(".sqlite"))
        self._index.execute("CREATE TABLE items (key TEXT PRIMARY KEY, offset INTEGER, length INTEGER)")

    def put(self, key: str, tensors: dict[str, torch.Tensor]) -> None:
        blob = io.BytesIO()
        # Without the item's memory around it, as it would come from an encoder.
        torch.save({name: tensor.clone() for name, tensor in tensors.items()}, blob)
        self._index.execute("INSERT INTO items VALUES (?, ?, ?)", (key, self._file.tell(), len(blob.getvalue())))
        self._file.write(blob.getvalue())

    def commit(self) -> None:
        self._file.flush()
        self._index.commit()

    def get(self, key: str) -> dict[str, torch.Tensor]:
        offset, length = self._index.execute("SELECT offset, length FROM items WHERE key = ?", [key]).fetchone()
        self._file.seek(offset)
        return torch.load(io.BytesIO(self._file.read(length)), weights_only=True)

    def close(self) -> None:
        self._file.close()
        self._index.close()


def _median_seconds(
    contestants: dict[str, Callable[[], None]], rounds: int, prepare: Callable[[], None] = lambda: None
) -> dict[str, float]:
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, run in contestants.items():
            prepare()
            started = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(taken) for name, taken in seconds.items()}


def _each(do: Callable[..., object], input_names: Sequence[object]) -> None:
    for input_name in input_names:
        do(input_name)


def _key(number: int) -> str:
    """As long as real keys, and as scattered."""
    return f"{number * 0x9E3779B97F4A7C15 % 2**64:016x}{number:024x}"


def _speed(seconds: float) -> str:
    return f"{ITEMS * ITEM_BYTES / seconds / MEGABYTE:,.0f} MB/s"


def _megabytes(field: str) -> float:
    """Of this process's memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1000 for line in lines if line.startswith(field))


if __name__ == "__main__":
    for line in look(Path(sys.argv[1])):
        sys.stdout.write(f"{line}\n")
