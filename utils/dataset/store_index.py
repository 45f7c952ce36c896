"""The index of a store: an SQLite table of the items' locations.

It uses a write-ahead log, so that readers and writers do not wait for each other. On a folder that several machines may
mount it uses SQLite's rollback journal, since the log needs memory that all of them share.
"""

from __future__ import annotations

import sqlite3
import threading
import time
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from utils.dataset.databases import connected, explaining_errors
from utils.errors import UserError

INDEX_NAME = "index.sqlite"
IF_DAMAGED = "remove this folder; what it held is encoded again"
BUSY_SECONDS = 120
SECONDS_BETWEEN_TRIES = 0.02
KEYS_PER_QUERY = 10_000
MANY_KEYS = 10_000
FEW_OTHERS = 4
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
_COLUMNS = "shard, offset, length, crc32"


class Extent(NamedTuple):
    """The location of an item's bytes, and their checksum: the columns of the index after the key."""

    shard: str
    offset: int
    length: int
    crc32: int


class StoreIndex:
    """Maps keys to the locations of items. Several threads may use it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        with self._explaining_errors(), ExitStack() as if_it_fails:
            self._database = connected(
                folder / INDEX_NAME, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False
            )
            # A connection that stays open keeps its locks.
            if_it_fails.callback(self._database.close)
            self._choose_journal()
            self._database.execute(
                "CREATE TABLE IF NOT EXISTS items (key TEXT PRIMARY KEY, shard TEXT, offset INTEGER,"
                " length INTEGER, crc32 INTEGER) WITHOUT ROWID"
            )
            self._count_deletions()
            if_it_fails.pop_all()

    def _count_deletions(self) -> None:
        """Has the index count its deletions from now on, whichever version of this program deletes."""
        if self._database.execute("SELECT 1 FROM sqlite_master WHERE name = 'deleted'").fetchone():
            return
        with self._transaction() as database:
            database.execute("CREATE TABLE IF NOT EXISTS states (id TEXT, deletions INTEGER)")
            database.execute("INSERT INTO states SELECT hex(randomblob(8)), 0 WHERE NOT EXISTS (SELECT 1 FROM states)")
            database.execute(
                "CREATE TRIGGER IF NOT EXISTS deleted AFTER DELETE ON items"
                " BEGIN UPDATE states SET deletions = deletions + 1; END"
            )

    def state(self) -> str:
        """A text that is the same as long as nothing is deleted, in this index alone: items may have been added."""
        return repr(self._query("SELECT id, deletions FROM states"))

    def __len__(self) -> int:
        return self._query("SELECT count(*) FROM items")[0][0]

    def keys(self) -> list[str]:
        return [key for (key,) in self._query("SELECT key FROM items")]

    def extent(self, key: str) -> Extent | None:
        rows = self._query(f"SELECT {_COLUMNS} FROM items WHERE key = ?", [key])
        return self._extent(rows[0]) if rows else None

    def extents(self, keys: Sequence[str]) -> dict[str, Extent]:
        """The extents of those keys that exist."""
        return {key: self._extent(extent) for key, *extent in self._by_parts(f"SELECT key, {_COLUMNS}", "key", keys)}

    def present(self, keys: Sequence[str]) -> set[str]:
        """Those keys that exist."""
        # To read the whole index takes a sixth of the time of asking for all that is in it.
        if MANY_KEYS < len(keys) and len(self) < FEW_OTHERS * len(keys):
            return set(keys).intersection(self.keys())
        return {key for (key,) in self._by_parts("SELECT key", "key", keys)}

    def in_shards(self, shards: Sequence[str]) -> dict[str, dict[str, Extent]]:
        """The items in each shard."""
        found: dict[str, dict[str, Extent]] = defaultdict(dict)
        for key, *extent in self._by_parts(f"SELECT key, {_COLUMNS}", "shard", shards):
            found[extent[0]][key] = self._extent(extent)
        return found

    def live_bytes(self) -> dict[str, int]:
        """The number of bytes of the items in each shard."""
        return self._numbers("SELECT shard, sum(length) FROM items GROUP BY shard")

    def ends(self) -> dict[str, int]:
        """The length that each shard must have at least."""
        return self._numbers("SELECT shard, max(offset + length) FROM items GROUP BY shard")

    def add(self, extents: Mapping[str, Extent]) -> None:
        """Adds items in one transaction, and replaces those with the same keys."""
        with self._transaction() as database:
            rows = [(key, *extent) for key, extent in extents.items()]
            database.executemany("INSERT OR REPLACE INTO items VALUES (?, ?, ?, ?, ?)", rows)

    def move(self, old: Mapping[str, Extent], new: Mapping[str, Extent]) -> None:
        """Moves items to their new extents in one transaction, and removes those without one. An item that was replaced
        or removed in the meantime is left alone."""
        moves = [(*new[key], key, *extent) for key, extent in old.items() if key in new]
        gone = [(key, *extent) for key, extent in old.items() if key not in new]
        same = "key = ? AND shard = ? AND offset = ? AND length = ? AND crc32 = ?"
        with self._transaction() as database:
            database.executemany(f"UPDATE items SET ({_COLUMNS}) = (?, ?, ?, ?) WHERE {same}", moves)
            database.executemany(f"DELETE FROM items WHERE {same}", gone)

    def remove(self, keys: Sequence[str]) -> None:
        with self._explaining_errors(), self._transaction() as database:
            database.executemany("DELETE FROM items WHERE key = ?", ((key,) for key in keys))

    def close(self) -> None:
        self._database.close()

    def _choose_journal(self) -> None:
        """Sets the kind of journal. Unlike elsewhere, SQLite does not wait for a lock here: if two processes create a
        store at once, it refuses one of them."""
        statement = f"PRAGMA journal_mode = {'DELETE' if on_network(self._folder) else 'WAL'}"
        deadline = time.monotonic() + BUSY_SECONDS
        while True:
            try:
                self._database.execute(statement)
                return
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                    raise
            time.sleep(SECONDS_BETWEEN_TRIES)

    def _query(self, statement: str, values: Collection[str] = ()) -> list[tuple]:
        with self._lock, self._explaining_errors():
            return self._database.execute(statement, values).fetchall()

    def _extent(self, row: Sequence[Any]) -> Extent:
        """The extent in a row of the index.

        Raises:
            UserError: the row holds something else.
        """
        self._check(row)
        return Extent(*row)

    def _numbers(self, statement: str) -> dict[str, int]:
        """A number for each shard."""
        rows = self._query(statement)
        for row in rows:
            self._check(row)
        return dict(rows)

    def _check(self, row: Sequence[Any]) -> None:
        shard, *numbers = row
        if not isinstance(shard, str) or not all(isinstance(number, int) and number >= 0 for number in numbers):
            what = f"is damaged: it has a row {tuple(row)!r:.80}; {IF_DAMAGED}"
            raise UserError.of(what, str(self._folder / INDEX_NAME))

    def _explaining_errors(self) -> AbstractContextManager[None]:
        return explaining_errors(self._folder / INDEX_NAME, IF_DAMAGED)

    def _by_parts(self, select: str, column: str, values: Sequence[str]) -> Iterator[tuple]:
        """Rows whose column has one of the values, in queries that each fit into one statement."""
        for start in range(0, len(values), KEYS_PER_QUERY):
            part = values[start : start + KEYS_PER_QUERY]
            yield from self._query(f"{select} FROM items WHERE {column} IN ({', '.join('?' * len(part))})", part)

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        # Immediate, since a transaction that begins with reading cannot wait for its turn to write.
        with self._lock, self._database as database:
            database.execute("BEGIN IMMEDIATE")
            yield database


def on_network(folder: Path, mounts: Iterable[str] | None = None) -> bool:
    """Whether other machines may use the folder's file system at the same time, according to /proc/mounts; without that
    file the folder counts as local."""
    try:
        lines = Path("/proc/mounts").read_text().splitlines() if mounts is None else mounts
    except OSError:
        return False
    path = folder.resolve()
    points = [line.split()[1:3] for line in lines]
    holding = [(len(point), kind) for point, kind in points if path.is_relative_to(point)]
    return max(holding, default=(0, ""))[1].startswith(NETWORK_FILESYSTEMS)
