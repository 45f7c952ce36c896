"""What processes do with stores until they are killed or their disk is full.

Apart from the tests, so that a process which is forked for them need not import pytest.
"""

import random
import resource
from contextlib import suppress

from tests.utils.dataset.stored import is_intact, item
from utils.dataset.shards import WriteFailed
from utils.dataset.tensor_store import TensorStore

KEYS = 200
ABSENT, CHANGING, PRESENT = range(3)
WRITING, FLUSHING, DELETING, COMPACTING = range(4)
POINTS = ("writing", "flush", "deletion", "compaction")


def churn(folder, seed, states, point, rounds):
    """Writes, flushes, deletes and compacts for ever, and says beforehand and afterwards what it does to which key."""
    generator = random.Random(seed)
    with (
        TensorStore(folder, "rolling", shard_bytes=6000, flush_bytes=2500) as rolling,
        TensorStore(folder, "batching") as batching,
    ):
        while True:
            for number, store, count in ((WRITING, rolling, 16), (FLUSHING, batching, 40)):
                keys = generator.sample(range(KEYS), count)
                for key in keys:
                    states[key] = PRESENT if states[key] == PRESENT else CHANGING
                point.value = WRITING
                for key in keys:
                    store.put(str(key), item(key))
                point.value = number
                store.flush()
                for key in keys:
                    states[key] = PRESENT
            point.value = DELETING
            keys = generator.sample(range(KEYS), KEYS // 3)
            for key in keys:
                states[key] = CHANGING if states[key] == PRESENT else states[key]
            rolling.delete(map(str, keys))
            for key in keys:
                states[key] = ABSENT
            point.value = COMPACTING
            rolling.compact(0.1)
            rounds.value += 1


def write(folder, name, seeds):
    with TensorStore(folder, name, flush_bytes=3000, shard_bytes=20_000) as store:
        for seed in seeds:
            store.put(str(seed), item(seed))


def fill_disk(folder, size, limit, flush_bytes, results):
    """Writes until it cannot, then looks at what is there, then makes room and goes on."""
    store = TensorStore(folder, "a", flush_bytes=flush_bytes)
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, most))
    seed, told = 0, ""
    try:
        for seed in range(10_000):
            store.put(str(seed), item(seed, size))
    except WriteFailed as error:
        told = str(error)
    with suppress(WriteFailed):
        store.flush()
    indexed = sorted(map(int, store.keys()))
    intact = sum(is_intact(store, number, size) for number in indexed)
    unreferenced = store.stats().unreferenced_bytes
    # A limit is for one file: another shard would have room.
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, most))
    with suppress(WriteFailed):
        store.put(str(seed), item(seed, size))
        store.flush()
        told = "nothing, though there was no room"
    unreferenced += store.stats().unreferenced_bytes
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    for number in range(len(indexed), seed + 1):
        store.put(str(number), item(number, size))
    store.close()
    results.put((seed, told, indexed, intact, unreferenced))
