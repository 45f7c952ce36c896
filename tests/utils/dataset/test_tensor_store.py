"""What is put comes back, also from several processes, and whatever is killed or damaged."""

import os
import random
import re
import sqlite3
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load

from tests.utils.dataset.stored import assert_items, item, shards
from utils.dataset.item_format import DTYPES
from utils.dataset.shards import GATHERED_BYTES, SHARDS_KEPT_OPEN
from utils.dataset.store_index import on_network
from utils.dataset.tensor_store import CorruptItem, TensorStore


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


def test_items_smaller_and_larger_than_what_is_gathered(tmp_path):
    sizes = {0: 10, 1: 30_000, 2: 100_000, 3: 300_000, 4: 10, 5: 131_060, 6: 200_000, 7: 131_064, 8: 10}
    with TensorStore(tmp_path, "a") as store:
        for seed, size in sizes.items():
            store.put(str(seed), item(seed, size))
        for seed, size in sizes.items():
            assert_items(store, [seed], size)
        assert store.stats().unreferenced_bytes == 0


def test_an_item_of_many_tensors(tmp_path):
    tensors = {str(number): torch.full((2,), number) for number in range(1500)}
    large = {"large": torch.zeros(GATHERED_BYTES + 1, dtype=torch.uint8), **tensors}
    with TensorStore(tmp_path, "a") as store:
        store.put("small", tensors)
        store.put("large", large)
        for key, expected in {"small": tensors, "large": large}.items():
            found = store.get(key)
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_views_are_stored_as_what_they_show(tmp_path):
    whole_BD = torch.arange(1000.0).view(10, 100)
    with TensorStore(tmp_path, "a") as store:
        store.put("key", {"row": whole_BD[3], "column": whole_BD[:, 3], "again": whole_BD[3]})
        found = store.get("key")
    assert torch.equal(found["row"], whole_BD[3]) and torch.equal(found["column"], whole_BD[:, 3])
    assert shards(tmp_path)[0].stat().st_size < 2000


def test_a_shard_holds_plain_safetensors(tmp_path):
    with TensorStore(tmp_path, "a") as store:
        store.put("7", item(7))
    found = load(shards(tmp_path)[0].read_bytes())
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
    assert len(shards(tmp_path)) == 3


def test_a_writer_never_appends_to_what_it_finds(tmp_path):
    """Two runs at once have writers of one name."""
    with (
        TensorStore(tmp_path, "a", flush_bytes=1) as first,
        TensorStore(tmp_path, "a", flush_bytes=1) as second,
    ):
        for seed in range(6):
            (first, second)[seed % 2].put(str(seed), item(seed))
        assert_items(first, range(6))
    assert len(shards(tmp_path)) == 2


def test_putting_again_replaces(tmp_path):
    with TensorStore(tmp_path, "a", flush_bytes=1) as store:
        store.put("1", item(5))
        store.get("1")
        store.put("1", item(1))
        assert_items(store, [1])
        assert len(store) == 1


def test_what_is_deleted_is_missing(tmp_path):
    with TensorStore(tmp_path, "a", flush_bytes=1) as store:
        for seed in range(3):
            store.put(str(seed), item(seed))
        store.get("0")
        store.delete(["0", "2", "unknown"])
        assert store.keys() == ["1"] and store.missing(["0", "1", "2"]) == ["0", "2"]
        with pytest.raises(KeyError):
            store.get("0")
        store.put("2", item(2))
        assert_items(store, [1, 2])


def test_what_is_deleted_before_it_was_written_is_never_written(tmp_path):
    with TensorStore(tmp_path, "a") as store:
        store.put("0", item(0))
        store.put("1", item(1))
        store.delete(["0"])
        store.flush()
        assert store.keys() == ["1"]


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
        lambda content: content.__setitem__(-700, content[-700] ^ 1),
        lambda content: content.__delitem__(slice(-100, None)),
    ],
    ids=["flipped bit", "cut short"],
)
def test_damage_is_named_found_and_mended(tmp_path, change):
    with TensorStore(tmp_path, "a") as store:
        for seed in range(3):
            store.put(str(seed), item(seed))
    (shard,) = shards(tmp_path)
    damage(shard, change)
    with TensorStore(tmp_path, "a") as store:
        offset = 2 * shard.stat().st_size // 3 // 8 * 8
        with pytest.raises(CorruptItem, match=rf"{re.escape(str(shard))}\s+the item 2 at byte (\d+) ") as caught:
            store.get("2")
        assert abs(int(re.search(r"byte (\d+)", str(caught.value))[1]) - offset) < 100
        assert_items(store, [0, 1])
        assert store.verify(["0", "1", "2", "unknown"]) == [caught.value.key] == ["2"]
        store.delete([caught.value.key])
        assert store.missing(["0", "1", "2"]) == ["2"]
        store.put("2", item(2))
        assert_items(store, range(3))
        assert store.verify(store.keys()) == []


def test_a_shard_cut_short_after_it_was_read(tmp_path):
    with TensorStore(tmp_path, "a") as store:
        for seed in range(2):
            store.put(str(seed), item(seed))
        assert_items(store, range(2))
        (shard,) = shards(tmp_path)
        damage(shard, lambda content: content.__delitem__(slice(-100, None)))
        assert_items(store, [0])
        with pytest.raises(CorruptItem):
            store.get("1")


def test_a_lost_shard_is_named(tmp_path):
    with TensorStore(tmp_path, "a") as store:
        store.put("1", item(1))
        store.flush()
        (shard,) = shards(tmp_path)
        shard.unlink()
        with pytest.raises(CorruptItem, match=shard.name):
            store.get("1")
        assert store.verify(["1"]) == ["1"]


def test_more_shards_than_are_kept_open(tmp_path):
    with TensorStore(tmp_path, "a", shard_bytes=1) as store:
        for seed in range(200):
            store.put(str(seed), item(seed, size=1))
            store.flush()
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(2):
            for seed in range(200):
                assert store.get(str(seed))["n"] == seed
        assert len(os.listdir("/proc/self/fd")) <= before + SHARDS_KEPT_OPEN


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


def test_the_index_keeps_a_write_ahead_log(tmp_path: Path) -> None:
    with TensorStore(tmp_path, "writer"):
        index = sqlite3.connect(tmp_path / "index.sqlite")
        assert index.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        index.close()


def test_network_file_systems_are_known():
    mounts = ["/dev/a / ext4 rw 0 0", "server:/b /data nfs4 rw 0 0", "/dev/c /data/local xfs rw 0 0"]
    assert not on_network(Path("/home/me"), mounts)
    assert on_network(Path("/data/cache"), mounts)
    assert not on_network(Path("/data/local/cache"), mounts)
