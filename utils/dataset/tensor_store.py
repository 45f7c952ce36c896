"""A folder that stores named tensors by key: shard files with bytes, and an SQLite index of the items' locations.

An item is on disk before the index refers to it, so a killed process leaves only complete items and unreferenced bytes.
Every writer has shards of its own, and never appends to a shard that it did not begin itself, so any number of
processes of any runs may fill one store.

`compact` reclaims bytes to which no row of the index refers (replaced or deleted items, remains of killed writers), and
leaves the shards of living writers alone. A reader needs no lock: it remembers extents that it has read, and asks the
index again when a shard is gone.

Callers use content-addressed keys, so a key never changes its meaning. A reader may therefore go on returning an item
after another process has replaced it.
"""

from __future__ import annotations

import struct
import time
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import torch

from utils.dataset import compaction
from utils.dataset.item_format import decoded, encoded
from utils.dataset.shards import ShardReader, ShardWriter, WriteFailed, sizes
from utils.dataset.store_index import Extent, StoreIndex
from utils.errors import Problem, UserError

SHARD_BYTES = 2**30
FLUSH_BYTES = 2**26
FLUSH_SECONDS = 30.0


class CorruptItem(UserError):
    """An item whose bytes differ from those that were written; after `delete([key])` it counts as missing."""

    def __init__(self, key: str, extent: Extent, path: Path) -> None:
        self.key = key
        what = f"the item {key} at byte {extent.offset} is damaged or missing; start once with --regenerate_cache"
        super().__init__([Problem(str(path), "", what)])


@dataclass(frozen=True)
class StoreStats:
    """The size of a store on disk, without its index."""

    items: int
    shards: int
    bytes: int
    unreferenced_bytes: int


class TensorStore:
    """Items are mappings from names to tensors. A store is used in one thread, or read in several.

    Args:
        folder: made if missing.
        writer_id: name of this writer's shards; None: this store only reads.
        shard_bytes: size after which a new shard begins.
        flush_bytes, flush_seconds: items are committed after this many bytes or seconds.
    """

    def __init__(
        self,
        folder: Path,
        writer_id: str | None = None,
        *,
        shard_bytes: int = SHARD_BYTES,
        flush_bytes: int = FLUSH_BYTES,
        flush_seconds: float = FLUSH_SECONDS,
    ) -> None:
        self.folder = folder
        self._flush_bytes, self._flush_seconds = flush_bytes, flush_seconds
        self._pending: dict[str, Extent] = {}
        self._last_flush = time.monotonic()
        self._known = _KnownPlaces()
        folder.mkdir(parents=True, exist_ok=True)
        self._index = StoreIndex(folder)
        self._reader = ShardReader(folder)
        self._writer = ShardWriter(folder, writer_id, shard_bytes) if writer_id is not None else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __len__(self) -> int:
        """Number of committed items."""
        return len(self._index)

    def put(self, key: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Stores an item and replaces the one with the same key; it is safe after the next `flush`.

        Raises:
            WriteFailed: there is no room for it. It is lost, and items since the last flush may be lost too, which a
                `flush` now would tell.
        """
        assert self._writer is not None, "this store only reads"
        self._pending[key] = self._writer.append(encoded(tensors))
        waited = time.monotonic() - self._last_flush
        if self._writer.uncommitted >= self._flush_bytes or waited >= self._flush_seconds:
            self.flush()

    def flush(self) -> None:
        """Synchronises all items to disk, then adds them to the index.

        Raises:
            WriteFailed: the disk is full or failed. Items since the last flush are lost, and nothing else.
        """
        if self._pending:
            try:
                self._writer.commit(lambda: self._index.add(self._pending))
            except WriteFailed:
                self._pending = {}
                raise
            self._known.forget(self._pending)
        self._pending = {}
        self._last_flush = time.monotonic()

    def get(self, key: str) -> dict[str, torch.Tensor]:
        """The item, on the CPU; its tensors share one block of memory that belongs to them. Its checksum is verified
        when this store reads it for the first time.

        Raises:
            KeyError: there is no such item.
            CorruptItem: its shard is missing, cut short, or changed.
        """
        if key in self._pending:
            self.flush()
        extent = self._known.find(key)
        item = self._reader.read(*extent) if extent else None
        item = self._first_read(key) if item is None else item
        try:
            return decoded(item)
        except ValueError as error:
            extent = self._index.extent(key)
            raise CorruptItem(key, extent, self.folder / extent.shard) from error

    def missing(self, keys: Iterable[str]) -> list[str]:
        """The keys without an item, in their order."""
        keys = list(keys)
        found = self._index.present(keys)
        return [key for key in keys if key not in found and key not in self._pending]

    def keys(self) -> list[str]:
        """All committed keys; the caller may `delete` those that no run wants."""
        return self._index.keys()

    def delete(self, keys: Iterable[str]) -> None:
        """Removes items. Their bytes stay until `compact`."""
        keys = list(keys)
        for key in keys:
            self._pending.pop(key, None)
        self._index.remove(keys)
        self._known.forget(keys)

    def verify(self, keys: Iterable[str]) -> list[str]:
        """The keys whose items are damaged, found by reading all of them; missing items do not count."""
        extents = self._index.extents(list(keys))
        # By extent, since disks read forwards.
        ordered = sorted(extents, key=lambda key: extents[key])
        return [key for key in ordered if self._sound(extents[key]) is None and not self._sound_elsewhere(key)]

    def lost(self, keys: Iterable[str]) -> list[str]:
        """The keys whose items lie in a shard that is gone or truncated, which can be found without reading items.
        Missing items do not count."""
        taken = sizes(self.folder)
        if self._is_long_enough(taken):
            return []
        extents = self._index.extents(list(keys))
        return [key for key, extent in extents.items() if taken.get(extent.shard, -1) < extent.offset + extent.length]

    def is_whole(self) -> bool:
        """Whether no shard is gone or truncated."""
        return self._is_long_enough(sizes(self.folder))

    def _is_long_enough(self, taken: Mapping[str, int]) -> bool:
        return all(taken.get(shard, -1) >= end for shard, end in self._index.ends().items())

    def state(self) -> str:
        """A text that is the same as long as nothing is deleted from this store."""
        return self._index.state()

    def shards_of(self, keys: Iterable[str]) -> list[str]:
        """The names of the shards with the items of these keys."""
        return sorted({extent.shard for extent in self._index.extents(list(keys)).values()})

    def lengths(self, keys: Iterable[str]) -> dict[str, int]:
        """The bytes that the items of these keys take; missing ones are left out."""
        return {key: extent.length for key, extent in self._index.extents(list(keys)).items()}

    @property
    def bytes(self) -> int:
        """The bytes of all shards on disk."""
        return sum(sizes(self.folder).values())

    def stats(self) -> StoreStats:
        """The current size of the store; uncommitted items of living writers count as unreferenced."""
        taken, live = sizes(self.folder), self._index.live_bytes()
        held = sum(min(live.get(shard, 0), size) for shard, size in taken.items())
        return StoreStats(len(self), len(taken), sum(taken.values()), sum(taken.values()) - held)

    def compact(self, share: float = compaction.SHARE) -> int:
        """Reclaims shards of which more than `share` is unreferenced by moving their items into new shards. Returns the
        number of freed bytes. Afterwards at most this fraction of the store is unreferenced, apart from the shards of
        living writers. Damaged items are dropped and logged.

        A process may die or fail at any point, and others may read, write and compact at the same time.

        Raises:
            WriteFailed: there is no room for the items that have to be moved.
        """
        assert self._writer is not None, "this store only reads"
        self.flush()
        self._writer.end()
        try:
            return compaction.compact(self.folder, self._index, self._writer, self._sound, share)
        finally:
            # The space of a shard becomes free only when no process has it open.
            self._reader.close()

    def close(self) -> None:
        """Flushes and closes."""
        try:
            self.flush()
        finally:
            if self._writer is not None:
                self._writer.end()
            self._reader.close()
            self._index.close()

    def _first_read(self, key: str) -> np.ndarray:
        """The item by its row in the index."""
        extent = self._index.extent(key)
        while extent is not None:
            item = self._sound(extent)
            if item is not None:
                self._known.add(key, extent)
                return item
            # The item was moved after the query: ask again until the index gives the same answer twice.
            before, extent = extent, self._index.extent(key)
            if extent == before:
                raise CorruptItem(key, extent, self.folder / extent.shard)
        raise KeyError(key)

    def _sound(self, extent: Extent) -> np.ndarray | None:
        """The bytes of an extent, if their checksum is right."""
        item = self._reader.read(extent.shard, extent.offset, extent.length)
        return item if item is not None and zlib.crc32(item) == extent.crc32 else None

    def _sound_elsewhere(self, key: str) -> bool:
        """Whether an item that could not be read at its extent has been removed or moved in the meantime."""
        try:
            self._first_read(key)
        except CorruptItem:
            return False
        except KeyError:
            pass
        return True


class _KnownPlaces:
    """Extents of items that were read and verified. They are packed, since there may be a million of them: about 200
    bytes each with the key, a third of the size of a tuple."""

    _PACKED = struct.Struct("<IQQ")

    def __init__(self) -> None:
        self._packed: dict[str, bytes] = {}
        self._shards: list[str] = []
        self._numbers: dict[str, int] = {}

    def find(self, key: str) -> tuple[str, int, int] | None:
        """Shard, offset and length."""
        packed = self._packed.get(key)
        if packed is None:
            return None
        number, offset, length = self._PACKED.unpack(packed)
        return self._shards[number], offset, length

    def add(self, key: str, extent: Extent) -> None:
        number = self._numbers.get(extent.shard)
        if number is None:
            # Two threads may both append a name; both numbers then mean that shard.
            self._shards.append(extent.shard)
            number = self._numbers[extent.shard] = self._shards.index(extent.shard)
        self._packed[key] = self._PACKED.pack(number, extent.offset, extent.length)

    def forget(self, keys: Iterable[str]) -> None:
        for key in keys:
            self._packed.pop(key, None)
