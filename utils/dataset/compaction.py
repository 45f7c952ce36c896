"""Frees the bytes to which no row of a store's index refers.

It works shard by shard: the live items are copied into a new shard and synchronised to disk, their rows are moved in
one transaction, and only then the old shard is unlinked. A process that is killed before the transaction leaves an
unreferenced copy, one that is killed after it leaves an unreferenced old shard; the next run frees either. A shard that
is copied was mostly empty, so the disk needs room for half a shard, and less is copied than is freed.

A shard that a living writer fills is locked and left alone. A shard that could be locked never grows again, so the
number of its rows can only fall during the compaction.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path

import numpy as np

from utils.dataset.shards import ShardWriter, WriteFailed, lock, sizes
from utils.dataset.store_index import Extent, StoreIndex

logger = logging.getLogger(__name__)

SHARE = 0.5
SHARDS_AT_ONCE = 64


def compact(
    folder: Path,
    index: StoreIndex,
    writer: ShardWriter,
    read: Callable[[Extent], np.ndarray | None],
    share: float,
) -> int:
    """Frees shards of which more than `share` is unreferenced. Returns the number of freed bytes.

    Args:
        read: an item's bytes, None if they are damaged.

    Raises:
        WriteFailed: there is no room for the items that have to be moved.
    """
    taken, live = sizes(folder), index.live_bytes()
    emptier = [shard for shard, size in taken.items() if _is_emptier(live.get(shard, 0), size, share)]
    # The emptiest first: they make room for what is copied out of the others.
    emptier.sort(key=lambda shard: live.get(shard, 0))
    freed = 0
    for start in range(0, len(emptier), SHARDS_AT_ONCE):
        with ExitStack() as locks:
            locked = [shard for shard in emptier[start : start + SHARDS_AT_ONCE] if _locked(folder / shard, locks)]
            # Read after locking: a writer may have committed its last rows since the shards were chosen.
            rows = index.in_shards(locked)
            for shard in locked:
                size, items = (folder / shard).stat().st_size, rows.get(shard, {})
                if _is_emptier(sum(extent.length for extent in items.values()), size, share):
                    freed += size - _move(items, index, writer, read)
                    (folder / shard).unlink()
    writer.end()
    return freed


def _is_emptier(live: int, size: int, share: float) -> bool:
    return live == 0 or size - live > share * size


def _locked(path: Path, locks: ExitStack) -> bool:
    """Takes the shard's lock until `locks` is closed; False if another process has it, or had it and unlinked the
    shard."""
    # One of another user of the group who does not share it stays.
    with suppress(FileNotFoundError, PermissionError):
        # Opened for writing, which some network file systems require for a lock.
        file = locks.enter_context(path.open("r+b"))
        return lock(file, without=False) and path.exists()
    return False


def _move(
    rows: Mapping[str, Extent], index: StoreIndex, writer: ShardWriter, read: Callable[[Extent], np.ndarray | None]
) -> int:
    """Copies a shard's live items to the writer's shard and then moves their rows. Returns the number of copied
    bytes."""
    extents: dict[str, Extent] = {}
    try:
        for key in sorted(rows, key=lambda key: rows[key].offset):
            item = read(rows[key])
            if item is not None:
                extents[key] = writer.append([item])
    except WriteFailed:
        writer.abandon()
        raise
    if rows:
        writer.commit(lambda: index.move(rows, extents))
    lost = [key for key in rows if key not in extents]
    if lost:
        logger.warning("%d damaged items were dropped from the cache; they are encoded again: %s", len(lost), lost[:10])
    return sum(extent.length for extent in extents.values())
