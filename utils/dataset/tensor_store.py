"""A folder that keeps named tensors by key: shard files of bytes, and an SQLite index of what lies where.

An item is on disk before the index speaks of it, so whatever a killed process leaves is either whole or
unreferenced bytes at a shard's end. Every writer has shards of its own, and never appends to one it did not
begin itself: any number of processes, also of two runs, may fill one store.

The index keeps a write-ahead log, so that readers and writers do not wait for each other; on a folder that
several machines may mount it keeps SQLite's rollback journal, since the log needs memory shared by all of them.
"""

from __future__ import annotations

import json
import os
import sqlite3
import threading
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple, Self

import torch
from safetensors.torch import save

from utils.settings.errors import SettingsError

INDEX_NAME = "index.sqlite"
SHARD_BYTES = 2**30
FLUSH_BYTES = 2**26
FLUSH_SECONDS = 30.0
BUSY_SECONDS = 120
SECONDS_BETWEEN_TRIES = 0.02
KEYS_PER_QUERY = 10_000
HEADER_LENGTH_BYTES = 8
NETWORK_FILESYSTEMS = (
    "9p",
    "afs",
    "beegfs",
    "ceph",
    "cifs",
    "fuse",
    "glusterfs",
    "gpfs",
    "lustre",
    "nfs",
    "ocfs2",
    "smb",
    "virtiofs",
)
DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


class CorruptItem(SettingsError):
    """An item whose bytes are not those that were written."""


class _Place(NamedTuple):
    """Where an item's bytes are, and their checksum: the columns of the index after the key."""

    shard: str
    offset: int
    length: int
    crc32: int


class TensorStore:
    """Items are mappings from names to tensors. A store is used in one thread, or read in several.

    Args:
        folder: made if missing.
        writer_id: name of this writer's shards; None: this store only reads.
        shard_bytes: size after which a new shard begins.
        flush_bytes, flush_seconds: what is put is committed after so much or so long.
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
        self._writer_id = writer_id
        self._shard_bytes, self._flush_bytes, self._flush_seconds = shard_bytes, flush_bytes, flush_seconds
        self._pending: dict[str, bytes] = {}
        self._pending_bytes = 0
        self._last_flush = time.monotonic()
        self._shard: BinaryIO | None = None
        self._verified: set[str] = set()
        self._lock = threading.Lock()
        folder.mkdir(parents=True, exist_ok=True)
        self._index = sqlite3.connect(
            folder / INDEX_NAME, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False
        )
        self._choose_journal()
        self._index.execute(
            "CREATE TABLE IF NOT EXISTS items (key TEXT PRIMARY KEY, shard TEXT, offset INTEGER,"
            " length INTEGER, crc32 INTEGER) WITHOUT ROWID"
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __len__(self) -> int:
        """Number of committed items."""
        return self._query("SELECT count(*) FROM items")[0][0]

    def put(self, key: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Keeps an item, in place of the one that had its key; it is safe after the next `flush`."""
        assert self._writer_id is not None, "this store only reads"
        # Cloned: safetensors refuses tensors that share memory.
        item = save({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()})
        self._pending[key] = item
        self._pending_bytes += len(item)
        waited = time.monotonic() - self._last_flush
        if self._pending_bytes >= self._flush_bytes or waited >= self._flush_seconds:
            self.flush()

    def flush(self) -> None:
        """Brings all items to disk, then into the index."""
        if self._pending:
            places = self._append(self._pending)
            with self._transaction() as index:
                index.executemany(
                    "INSERT OR REPLACE INTO items VALUES (?, ?, ?, ?, ?)",
                    [(key, *place) for key, place in places.items()],
                )
        self._pending, self._pending_bytes = {}, 0
        self._last_flush = time.monotonic()

    def get(self, key: str) -> dict[str, torch.Tensor]:
        """The item, on the CPU; its tensors share one piece of memory that is theirs alone.

        Raises:
            KeyError: there is no such item.
            CorruptItem: its shard is missing, cut short, or changed.
        """
        if key in self._pending:
            self.flush()
        rows = self._query("SELECT shard, offset, length, crc32 FROM items WHERE key = ?", [key])
        if not rows:
            raise KeyError(key)
        return _tensors(self._read(key, _Place(*rows[0])))

    def missing(self, keys: Iterable[str]) -> list[str]:
        """Those of the keys that have no item, in their order."""
        keys = list(keys)
        found = set(self._pending)
        for part in _parts(keys):
            rows = self._query(f"SELECT key FROM items WHERE key IN {_marks(part)}", part)
            found.update(key for (key,) in rows)
        return [key for key in keys if key not in found]

    def delete(self, keys: Iterable[str]) -> None:
        """Removes items, and the shards that hold no other. The bytes in other shards stay, unused."""
        self.flush()
        self._end_shard()
        touched: set[str] = set()
        with self._transaction() as index:
            for part in _parts(list(keys)):
                rows = index.execute(f"DELETE FROM items WHERE key IN {_marks(part)} RETURNING shard", part)
                touched.update(shard for (shard,) in rows)
            kept = {shard for (shard,) in index.execute("SELECT DISTINCT shard FROM items")}
        for shard in touched - kept:
            (self.folder / shard).unlink(missing_ok=True)

    def close(self) -> None:
        """Flushes and closes."""
        try:
            self.flush()
        finally:
            self._end_shard()
            self._index.close()

    def _choose_journal(self) -> None:
        """Sets the journal's kind. SQLite does not wait for its turn to do so, as it does elsewhere: of two processes
        that begin a store at once, one is refused."""
        statement = f"PRAGMA journal_mode = {'DELETE' if _on_network(self.folder) else 'WAL'}"
        deadline = time.monotonic() + BUSY_SECONDS
        while True:
            try:
                self._index.execute(statement)
                return
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                    raise
            time.sleep(SECONDS_BETWEEN_TRIES)

    def _append(self, items: Mapping[str, bytes]) -> dict[str, _Place]:
        """Writes items to the end of the shard and waits for the disk."""
        shard = self._shard = self._shard or self._new_shard()
        places = {}
        for key, item in items.items():
            places[key] = _Place(Path(shard.name).name, shard.tell(), len(item), zlib.crc32(item))
            shard.write(item)
        shard.flush()
        os.fsync(shard.fileno())
        if shard.tell() >= self._shard_bytes:
            self._end_shard()
        return places

    def _new_shard(self) -> BinaryIO:
        """A shard that no other process has: creating a file that exists fails."""
        number = 0
        while True:
            try:
                shard = (self.folder / f"{self._writer_id}-{number}.shard").open("xb")
            except FileExistsError:
                number += 1
            else:
                _sync_folder(self.folder)
                return shard

    def _end_shard(self) -> None:
        if self._shard is not None:
            self._shard.close()
            self._shard = None

    def _read(self, key: str, place: _Place) -> torch.Tensor:
        """The item's bytes, checked when they are read for the first time."""
        # Read and not mapped: a shard cut short is an error with a name, where a mapping would end the
        # process. The copy takes a fraction of a millisecond for some megabytes.
        item = torch.empty(place.length, dtype=torch.uint8)
        try:
            with (self.folder / place.shard).open("rb", buffering=0) as shard:
                shard.seek(place.offset)
                read = shard.readinto(item.numpy())
        except FileNotFoundError:
            read = 0
        sound = read == place.length and (key in self._verified or zlib.crc32(item.numpy()) == place.crc32)
        if not sound:
            what = f"the item {key} at byte {place.offset} is damaged or missing; start once with --regenerate_cache"
            raise CorruptItem.of(what, str(self.folder / place.shard))
        self._verified.add(key)
        return item

    def _query(self, statement: str, values: Sequence[str] = ()) -> list[tuple]:
        with self._lock:
            return self._index.execute(statement, values).fetchall()

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        # Immediate: a transaction that begins by reading cannot wait for its turn to write.
        with self._lock, self._index as index:
            index.execute("BEGIN IMMEDIATE")
            yield index


def _tensors(item: torch.Tensor) -> dict[str, torch.Tensor]:
    """The tensors in an item's bytes, as views.

    Layout (safetensors): the header's length in 8 bytes, the header in JSON, the tensors at offsets from its
    end.
    """
    length = int.from_bytes(item[:HEADER_LENGTH_BYTES].numpy().tobytes(), "little")
    content = HEADER_LENGTH_BYTES + length
    header = json.loads(item[HEADER_LENGTH_BYTES:content].numpy().tobytes())
    return {
        name: item[content + start : content + end].view(DTYPES[entry["dtype"]]).view(entry["shape"])
        for name, entry in header.items()
        for start, end in [entry["data_offsets"]]
    }


def _parts(keys: Sequence[str]) -> Iterator[Sequence[str]]:
    """The keys in pieces that fit into one statement."""
    return (keys[start : start + KEYS_PER_QUERY] for start in range(0, len(keys), KEYS_PER_QUERY))


def _marks(values: Sequence[str]) -> str:
    return f"({', '.join('?' * len(values))})"


def _sync_folder(folder: Path) -> None:
    """Brings the folder's list of files to disk: a file that was synchronised can still lose its name."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _on_network(folder: Path) -> bool:
    """Whether the folder lies on a file system that other machines may use at the same time, as far as the system
    tells (/proc/mounts); elsewhere it is taken for local."""
    try:
        mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    except OSError:
        return False
    path = folder.resolve()
    holding = [(len(point), kind) for point, kind in mounts if path.is_relative_to(point)]
    return max(holding, default=(0, ""))[1].startswith(NETWORK_FILESYSTEMS)
