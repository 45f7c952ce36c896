"""What is put comes back, also from several processes, and whatever is killed or damaged."""

import multiprocessing
import os
import random
import signal
import sqlite3
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load

from utils.dataset.tensor_store import DTYPES, CorruptItem, TensorStore


def item(seed, size=64):
    return {
        "x_LD": torch.randn(size, 4, generator=torch.Generator().manual_seed(seed)),
        "n": torch.tensor(seed),
    }


def assert_items(store, seeds):
    for seed in seeds:
        found, expected = store.get(str(seed)), item(seed)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def shards(folder):
    return sorted(path.name for path in folder.glob("*.shard"))


def test_items_come_back(tmp_path):
    with TensorStore(tmp_path, "a") as store:
        for seed in range(20):
            store.put(str(seed), item(seed))
        assert len(store) == 0
        assert_items(store, [3])
        assert len(store) == 20
    with TensorStore(tmp_path) as store:
        assert_items(store, range(20))
        assert store.missing(["x", "3", "y", "19"]) == ["x", "y"]
        with pytest.raises(KeyError):
            store.get("x")


def test_a_store_that_another_process_is_beginning_is_waited_for(tmp_path):
    other = sqlite3.connect(tmp_path / "index.sqlite", isolation_level=None, check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")
    threading.Timer(0.2, lambda: other.execute("COMMIT")).start()
    with TensorStore(tmp_path, "a") as store:
        store.put("0", item(0))
        assert_items(store, [0])


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_every_type_and_shape(tmp_path, dtype):
    values = torch.arange(6).to(torch.float32).to(dtype)
    tensors = {
        "matrix": values.view(2, 3),
        "odd": values[:3],
        "scalar": values[4],
        "none": values[:0].view(0, 5),
    }
    with TensorStore(tmp_path, "a") as store:
        store.put("before", {"x": torch.ones(5, dtype=torch.uint8)})
        store.put("key", tensors)
        found = store.get("key")
    for name, tensor in tensors.items():
        assert found[name].dtype == dtype and found[name].shape == tensor.shape
        assert torch.equal(found[name].float(), tensor.float())


def test_types_of_all_widths_in_one_item(tmp_path):
    tensors = {str(dtype): torch.ones(3).to(dtype) for dtype in DTYPES.values()}
    with TensorStore(tmp_path, "a") as store:
        store.put("key", tensors)
        found = store.get("key")
    assert all(torch.equal(found[name].float(), torch.ones(3)) for name in tensors)


def test_views_are_stored_as_what_they_show(tmp_path):
    whole_BD = torch.arange(1000.0).view(10, 100)
    with TensorStore(tmp_path, "a") as store:
        store.put("key", {"row": whole_BD[3], "column": whole_BD[:, 3], "again": whole_BD[3]})
        found = store.get("key")
    assert torch.equal(found["row"], whole_BD[3]) and torch.equal(found["column"], whole_BD[:, 3])
    assert (tmp_path / "a-0.shard").stat().st_size < 2000


def test_a_shard_holds_plain_safetensors(tmp_path):
    with TensorStore(tmp_path, "a") as store:
        store.put("7", item(7))
    found = load((tmp_path / "a-0.shard").read_bytes())
    assert torch.equal(found["x_LD"], item(7)["x_LD"])


def test_the_reader_may_change_what_it_got(tmp_path):
    with TensorStore(tmp_path, "a") as store:
        store.put("1", item(1))
        store.get("1")["x_LD"].zero_()
        assert_items(store, [1])


def test_flushes_by_size_and_by_time(tmp_path):
    with (
        TensorStore(tmp_path / "size", "a", flush_bytes=5000) as store,
        TensorStore(tmp_path / "size") as reader,
    ):
        counts = []
        for seed in range(6):
            store.put(str(seed), item(seed))
            counts.append(len(reader))
        assert counts[0] == 0 and counts[-1] >= 4
    with (
        TensorStore(tmp_path / "time", "a", flush_seconds=0) as store,
        TensorStore(tmp_path / "time") as reader,
    ):
        store.put("1", item(1))
        assert len(reader) == 1


def test_a_full_shard_is_followed_by_another(tmp_path):
    with TensorStore(tmp_path, "a", shard_bytes=3000, flush_bytes=1) as store:
        for seed in range(9):
            store.put(str(seed), item(seed))
        assert_items(store, range(9))
    assert shards(tmp_path) == ["a-0.shard", "a-1.shard", "a-2.shard"]


def test_a_writer_never_appends_to_what_it_finds(tmp_path):
    """Two runs at once have writers of one name."""
    with (
        TensorStore(tmp_path, "a", flush_bytes=1) as first,
        TensorStore(tmp_path, "a", flush_bytes=1) as second,
    ):
        for seed in range(6):
            (first, second)[seed % 2].put(str(seed), item(seed))
        assert_items(first, range(6))
    assert shards(tmp_path) == ["a-0.shard", "a-1.shard"]


def test_putting_again_replaces(tmp_path):
    with TensorStore(tmp_path, "a", flush_bytes=1) as store:
        store.put("1", item(5))
        store.get("1")
        store.put("1", item(1))
        assert_items(store, [1])
        assert len(store) == 1


def test_delete_frees_shards_that_nothing_else_is_in(tmp_path):
    with TensorStore(tmp_path, "a", shard_bytes=1, flush_bytes=1) as store:
        for seed in range(3):
            store.put(str(seed), item(seed))
        store.delete(["0", "2", "unknown"])
        assert shards(tmp_path) == ["a-1.shard"] and store.missing(["0", "1", "2"]) == ["0", "2"]
        store.put("2", item(2))
        assert_items(store, [1, 2])


def test_more_keys_than_one_statement_takes(tmp_path):
    with TensorStore(tmp_path, "a") as store:
        for key in ("5", "39999"):
            store.put(key, item(0))
        keys = [str(number) for number in range(40_000)]
        assert len(store.missing(keys)) == 39_998
        store.delete(keys)
        assert len(store) == 0


def damage(path, change):
    content = bytearray(path.read_bytes())
    change(content)
    path.write_bytes(content)


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content.__setitem__(700, content[700] ^ 1),
        lambda content: content.__delitem__(slice(900, None)),
    ],
    ids=["flipped bit", "cut short"],
)
def test_damage_is_named(tmp_path, change):
    with TensorStore(tmp_path, "a") as store:
        store.put("1", item(1))
    damage(tmp_path / "a-0.shard", change)
    with TensorStore(tmp_path) as store, pytest.raises(CorruptItem, match=r"a-0.shard\s+the item 1 at byte 0"):
        store.get("1")


def test_a_lost_shard_is_named(tmp_path):
    with TensorStore(tmp_path, "a") as store:
        store.put("1", item(1))
        store.flush()
        (tmp_path / "a-0.shard").unlink()
        with pytest.raises(CorruptItem, match="a-0.shard"):
            store.get("1")


def test_threads_read_together(tmp_path):
    with TensorStore(tmp_path, "a") as store:
        for seed in range(30):
            store.put(str(seed), item(seed))
        store.flush()
        failures = []

        def read():
            try:
                assert_items(store, random.Random(0).sample(range(30), 30))
            except Exception as error:
                failures.append(error)

        threads = [threading.Thread(target=read) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures


def write(folder, name, seeds, last):
    """A process that writes, and tells which item it wrote last."""
    with TensorStore(folder, name, flush_bytes=3000) as store:
        for seed in seeds:
            store.put(str(seed), item(seed))
            last.value = seed


def test_processes_write_at_once_and_a_killed_one_leaves_a_sound_store(tmp_path):
    context = multiprocessing.get_context("spawn")
    marks = [context.Value("q", -1) for _ in range(3)]
    work = [("a", range(200)), ("b", range(200, 400)), ("killed", range(1000, 1_000_000))]
    processes = [
        context.Process(target=write, args=(tmp_path, name, seeds, mark))
        for (name, seeds), mark in zip(work, marks, strict=True)
    ]
    for process in processes:
        process.start()
    while marks[2].value < 1100:
        assert processes[2].is_alive()
        time.sleep(0.01)
    os.kill(processes[2].pid, signal.SIGKILL)
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, -signal.SIGKILL]
    with TensorStore(tmp_path, "killed") as store:
        seeds = range(1000, marks[2].value + 2)
        lost = {int(key) for key in store.missing(map(str, seeds))}
        survivors = [seed for seed in seeds if seed not in lost]
        assert len(survivors) >= 90 and survivors == list(range(1000, 1000 + len(survivors)))
        assert_items(store, [*range(400), *survivors])
        store.put("1", item(1))
        assert_items(store, [1])
        assert len(store) == 400 + len(survivors)


def test_the_index_keeps_a_write_ahead_log(tmp_path: Path) -> None:
    with TensorStore(tmp_path, "writer"):
        index = sqlite3.connect(tmp_path / "index.sqlite")
        assert index.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        index.close()
