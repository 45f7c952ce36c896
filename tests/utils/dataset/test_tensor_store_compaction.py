"""What nothing refers to is freed; what is live, being written or being read is not harmed by it."""

import logging
import random

import pytest

from tests.utils.dataset.stored import assert_items, item, shards
from utils.dataset.tensor_store import TensorStore


def filled(folder, seeds, name="a", shard_bytes=5000):
    """A store with about four items in a shard."""
    store = TensorStore(folder, name, shard_bytes=shard_bytes, flush_bytes=1)
    for seed in seeds:
        store.put(str(seed), item(seed))
    return store


def disk_bytes(folder):
    return sum(path.stat().st_size for path in shards(folder))


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 0.75])
def test_no_more_than_the_share_stays(tmp_path, share):
    with filled(tmp_path, range(80)) as store:
        kept = sorted(random.Random(0).sample(range(80), 30))
        store.delete(str(seed) for seed in set(range(80)) - set(kept))
        before = disk_bytes(tmp_path)
        freed = store.compact(share)
        stats = store.stats()
        assert freed == before - disk_bytes(tmp_path) > 0
        assert stats.items == 30 and stats.bytes == disk_bytes(tmp_path) and stats.shards == len(shards(tmp_path))
        assert stats.unreferenced_bytes <= share * stats.bytes
        assert_items(store, kept)
    with TensorStore(tmp_path) as store:
        assert sorted(map(int, store.keys())) == kept
        assert_items(store, kept)


def test_a_full_store_is_left_alone(tmp_path):
    with filled(tmp_path, range(20)) as store:
        store.delete(["3", "9"])
        before = shards(tmp_path)
        assert store.compact() == 0 and shards(tmp_path) == before
        length = disk_bytes(tmp_path) // 20
        assert store.stats().unreferenced_bytes == 2 * length


def test_what_is_replaced_is_freed(tmp_path):
    with filled(tmp_path, range(20)) as store:
        size = disk_bytes(tmp_path)
        for seed in range(20):
            store.put(str(seed), item(seed))
        assert disk_bytes(tmp_path) == 2 * size
        assert store.compact() == size == disk_bytes(tmp_path)
        assert_items(store, range(20))


def test_an_orphan_shard_is_freed(tmp_path):
    with filled(tmp_path, range(4)) as store:
        (tmp_path / "dead-0.shard").write_bytes(b"half an item")
        (tmp_path / "dead-1.shard").touch()
        assert store.compact() == 12
        assert not list(tmp_path.glob("dead*"))
        assert_items(store, range(4))


def test_a_living_writers_shard_is_not_touched(tmp_path):
    """Its first bytes are on disk and not in the index, or all its items were deleted, and it goes on."""
    with (
        TensorStore(tmp_path, "living", flush_bytes=1) as living,
        TensorStore(tmp_path, "unborn") as unborn,
        TensorStore(tmp_path, "other") as other,
    ):
        living.put("0", item(0))
        unborn.put("2", item(2))
        other.delete(["0"])
        assert other.compact() == 0 and len(shards(tmp_path)) == 2
        living.put("1", item(1))
        assert_items(living, [1])
        assert_items(unborn, [2])
        assert_items(other, [1, 2])
    with TensorStore(tmp_path, "later") as later:
        assert later.compact(0) > 0 and len(shards(tmp_path)) == 2
        assert_items(later, [1, 2])


def test_readers_go_on_while_shards_move(tmp_path):
    """One that has a moved shard open, one that only remembers places in it, one that starts afterwards."""
    with filled(tmp_path, range(40)) as store, TensorStore(tmp_path) as holding, TensorStore(tmp_path) as remembering:
        assert_items(holding, range(40))
        assert_items(remembering, range(40))
        remembering._reader.close()
        for _ in range(2):
            store.delete(str(seed) for seed in range(40) if seed % 4)
            store.compact(0)
            kept = range(0, 40, 4)
            for reader in (store, holding, remembering):
                assert_items(reader, kept)
            for seed in range(40):
                store.put(str(seed), item(seed))
        with TensorStore(tmp_path) as late:
            assert_items(late, range(40))
        assert_items(remembering, range(40))


def test_an_item_that_moves_between_the_question_where_it_is_and_its_reading(tmp_path, monkeypatch):
    with filled(tmp_path, range(8)) as store, TensorStore(tmp_path) as reader:
        store.delete(["1"])
        read = reader._reader.read

        def read_after_compaction(*extent):
            store.compact(0)
            return read(*extent)

        monkeypatch.setattr(reader._reader, "read", read_after_compaction)
        assert_items(reader, [0])
        store.delete(["2"])
        assert reader.verify(["3"]) == []


def test_an_item_that_was_deleted_elsewhere_is_missing_once_its_shard_is_gone(tmp_path):
    with filled(tmp_path, range(8)) as store, TensorStore(tmp_path) as reader:
        assert_items(reader, range(8))
        reader._reader.close()
        store.delete(["1"])
        store.compact(0)
        with pytest.raises(KeyError):
            reader.get("1")


def test_what_changes_while_it_is_copied_stays_changed(tmp_path, monkeypatch):
    """Between the copy of a shard and the move of its rows, others delete and replace items of it."""
    with filled(tmp_path, range(8), shard_bytes=10**6) as store, TensorStore(tmp_path, "other") as other:
        store.delete(["6", "7"])
        commit = store._writer.commit

        def commit_after_others(record):
            other.delete(["0"])
            other.put("1", item(101))
            other.flush()
            commit(record)

        monkeypatch.setattr(store._writer, "commit", commit_after_others)
        store.compact(0)
        assert store.missing(map(str, range(8))) == ["0", "6", "7"]
        assert store.get("1")["n"] == 101
        assert_items(store, range(2, 6))


def test_damaged_items_are_dropped_and_told(tmp_path, caplog):
    with filled(tmp_path, range(4), shard_bytes=10**6) as store:
        (shard,) = shards(tmp_path)
        content = bytearray(shard.read_bytes())
        content[-10] ^= 1
        shard.write_bytes(content)
        store.delete(["0"])
        with caplog.at_level(logging.WARNING):
            store.compact(0)
        assert "1 damaged" in caplog.text and "'3'" in caplog.text
        assert store.missing(map(str, range(4))) == ["0", "3"]
        assert_items(store, [1, 2])


def test_only_what_a_caller_wants_is_kept(tmp_path):
    with filled(tmp_path, range(30)) as store:
        wanted = {str(seed) for seed in range(0, 30, 5)}
        store.delete(set(store.keys()) - wanted)
        store.compact()
        assert set(store.keys()) == wanted
        assert store.stats().unreferenced_bytes <= store.stats().bytes / 2
