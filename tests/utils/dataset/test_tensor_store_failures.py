"""Processes that are killed, and disks that are full: what was indexed reads, and nothing else is lost."""

import errno
import logging
import multiprocessing
import os
import random
import re
import signal
import sqlite3
import time

import pytest

from tests.processes import PRELOADED
from tests.utils.dataset.store_workers import (
    ABSENT,
    CHANGING,
    COMPACTING,
    FLUSHING,
    KEYS,
    POINTS,
    PRESENT,
    WRITING,
    churn,
    fill_disk,
    write,
)
from tests.utils.dataset.stored import assert_items, is_intact, item, shards
from utils.dataset.shards import WriteFailed
from utils.dataset.tensor_store import TensorStore

logger = logging.getLogger(__name__)

KILLS = 20
# By the point that a kill is meant for: how many seconds after it began the kill may come.
SPREAD = {WRITING: 0.01, FLUSHING: 0.001, COMPACTING: 0.02}


@pytest.fixture(scope="module")
def context():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def check(folder, states):
    """Compares the store with what the killed process said; takes over what it was at. How many are indexed, intact."""
    with TensorStore(folder) as store:
        present = {int(key) for key in store.keys()}
        for key, state in enumerate(states):
            assert state == CHANGING or (key in present) == (state == PRESENT), key
            states[key] = PRESENT if key in present else ABSENT
        return len(present), sum(is_intact(store, key) for key in present)


def test_kill_9_at_any_point(tmp_path, context):
    generator = random.Random(0)
    states = context.RawArray("b", KEYS)
    point, rounds = context.RawValue("i", 0), context.RawValue("i", 0)
    struck = set()
    for number in range(KILLS):
        wanted = list(SPREAD)[number % len(SPREAD)]
        process = context.Process(target=churn, args=(tmp_path, number, states, point, rounds), daemon=True)
        until = rounds.value + generator.randrange(2)
        process.start()
        while process.is_alive() and (rounds.value < until or point.value != wanted):
            time.sleep(0.0002)
        time.sleep(generator.uniform(0, SPREAD[wanted]))
        assert process.is_alive()
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        struck.add(point.value)
        indexed, intact = check(tmp_path, states)
        logger.info("killed in %s: %d indexed, %d intact", POINTS[point.value], indexed, intact)
        assert intact == indexed > 0
    assert {WRITING, COMPACTING} <= struck
    with TensorStore(tmp_path, "last") as store:
        store.compact(0)
        assert store.stats().unreferenced_bytes == 0
        assert check(tmp_path, states) == (len(store), len(store))


def test_processes_write_and_compact_at_once(tmp_path, context):
    processes = [
        context.Process(target=write, args=(tmp_path, "same", range(start, start + 100))) for start in (0, 100)
    ]
    for process in processes:
        process.start()
    with TensorStore(tmp_path, "compacting") as store:
        while any(process.is_alive() for process in processes):
            gone = [key for key in store.keys() if int(key) % 3 == 0]
            store.delete(gone)
            store.compact(0)
        for process in processes:
            process.join()
        assert [process.exitcode for process in processes] == [0, 0]
        store.delete(str(seed) for seed in range(0, 200, 3))
        store.compact(0)
        kept = [seed for seed in range(200) if seed % 3]
        assert sorted(map(int, store.keys())) == kept
        assert_items(store, kept)
        assert store.stats().unreferenced_bytes == 0


@pytest.mark.parametrize(
    ("size", "limit", "flush_bytes", "lost"),
    [(4096, 300_000, 1, 0), (4096, 6_000_000, 10**6, 32), (1, 80_000, 1, 0)],
    ids=["shard", "shard, gathered", "index"],
)
def test_a_full_disk(tmp_path, context, size, limit, flush_bytes, lost):
    """An item that cannot be written, or its row, leaves no half-written tail, and nothing that was indexed is lost;
    `lost` is how many items may be that were not yet."""
    results = context.Queue()
    arguments = (tmp_path, size, limit, flush_bytes, results)
    process = context.Process(target=fill_disk, args=arguments, daemon=True)
    process.start()
    failed, told, indexed, intact, unreferenced = results.get(timeout=30)
    process.join()
    assert indexed == list(range(len(indexed))) and failed - lost <= len(indexed) <= failed
    assert intact == len(indexed) > 1 and unreferenced == 0
    with TensorStore(tmp_path, "b") as store:
        assert len(store) == failed + 1
        assert_items(store, range(failed + 1), size)
        length = store.stats().bytes // (failed + 1)
    wanted = re.search(r"could not write ([\d,]+) bytes, with [\d,]+ bytes free", told)[1]
    assert length <= int(wanted.replace(",", "")) <= (lost + 1) * length and str(tmp_path) in told


@pytest.mark.parametrize("call", ["fsync", "pwritev"])
def test_compaction_without_room(tmp_path, monkeypatch, call):
    """What cannot be moved stays where it is, also when one of two items could be copied."""
    original, calls = getattr(os, call), []

    def no_room_after_one(*arguments):
        calls.append(arguments)
        # The first `fsync` is that of the folder, at a shard's birth.
        return original(*arguments) if len(calls) == 1 else _no_room(arguments)

    with TensorStore(tmp_path, "a") as store:
        for seed in range(8):
            store.put(str(seed), item(seed))
        store.flush()
        store.delete(map(str, range(6)))
        before = store.stats()
        with monkeypatch.context() as patch:
            patch.setattr(os, call, no_room_after_one)
            patch.setattr("utils.dataset.shards.GATHERED_BYTES", 1)
            with pytest.raises(WriteFailed, match="No space left"):
                store.compact()
        assert store.stats() == before
        assert len(shards(tmp_path)) == 1
        assert_items(store, [6, 7])
        assert store.compact() == before.unreferenced_bytes


def test_a_shard_that_cannot_be_begun(tmp_path, monkeypatch):
    with TensorStore(tmp_path, "a") as store:
        with monkeypatch.context() as patch:
            patch.setattr("os.fsync", _no_room)
            with pytest.raises(WriteFailed, match="No space left"):
                store.put("0", item(0))
        assert shards(tmp_path) == []
        store.put("1", item(1))
        assert_items(store, [1])
        assert store.keys() == ["1"]


def test_what_a_full_disk_stopped_does_not_stop_the_end(tmp_path, monkeypatch):
    """The store is closed although the last flush fails."""
    store = TensorStore(tmp_path, "a")
    store.put("0", item(0))
    monkeypatch.setattr("os.fsync", _no_room)
    with pytest.raises(WriteFailed, match="No space left"):
        store.close()
    assert shards(tmp_path) == []
    with pytest.raises(sqlite3.ProgrammingError, match="closed"):
        store.keys()


def _no_room(_):
    raise OSError(errno.ENOSPC, "No space left on device")
