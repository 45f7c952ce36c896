"""Records which run wants which items of a cache; items that no run wants can be deleted."""

from __future__ import annotations

import hashlib
import sqlite3
import time
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from utils.dataset.databases import connected, explaining_errors
from utils.dataset.tensor_store import TensorStore
from utils.errors import UserError

NAME = "references.sqlite"
BUSY_SECONDS = 120
SECONDS_PER_DAY = 86400
STALE_SHARE = 0.5


@dataclass(frozen=True)
class Keep:
    """What stays although no run wants it any more: what one wanted within the last `days`, the latest first, as long
    as all of it takes no more than `bytes`."""

    days: float = 0.0
    bytes: int = 0


def remember(cache_dir: Path, store: str, owner: Path, keys: Iterable[str]) -> None:
    """Records that the run with the settings file `owner` wants these items of a store, and no other items of that
    store. Owners whose file is gone want nothing."""
    keys = sorted(keys)
    digest = hashlib.blake2b("".join(keys).encode(), digest_size=16).hexdigest()
    with _opened(cache_dir) as index:
        _forget_gone(index)
        this = [str(owner.resolve()), store]
        if index.execute("SELECT digest FROM owners WHERE owner = ? AND store = ?", this).fetchone() == (digest,):
            return
        _release(index, "owner = ? AND store = ?", this)
        for table in ("wanted", "complete"):
            index.execute(f"DELETE FROM {table} WHERE owner = ? AND store = ?", this)
        index.executemany("INSERT INTO wanted VALUES (?, ?, ?)", ((*this, key) for key in keys))
        index.execute("INSERT OR REPLACE INTO owners VALUES (?, ?, ?)", [*this, digest])


def _forget_gone(index: sqlite3.Connection) -> None:
    """Lets go of what runs wanted whose files are gone."""
    gone = [name for (name,) in index.execute("SELECT DISTINCT owner FROM owners") if not Path(name).exists()]
    for name in gone:
        _release(index, "owner = ?", [name])
        for table in ("owners", "wanted", "complete"):
            index.execute(f"DELETE FROM {table} WHERE owner = ?", [name])


def _release(index: sqlite3.Connection, of_whom: str, values: list[str]) -> None:
    """Notes when items were wanted last, before they may be wanted no more."""
    index.execute(
        f"INSERT OR REPLACE INTO released SELECT store, key, ? FROM wanted WHERE {of_whom}", [time.time(), *values]
    )


def note_complete(cache_dir: Path, store: TensorStore, owner: Path, identity: str, wanted: int) -> None:
    """Notes that a store has all items that the run wants of it, until it wants others or something is deleted.

    Args:
        identity: of what it wants, the same as long as that is the same.
        wanted: their number.
    """
    with _opened(cache_dir) as index:
        row = [str(owner.resolve()), store.folder.name, identity, store.state(), len(store), wanted]
        index.execute("INSERT OR REPLACE INTO complete VALUES (?, ?, ?, ?, ?, ?)", row)


def complete(cache_dir: Path, store: TensorStore, owner: Path, identity: str) -> int | None:
    """How many items the run wants of a store that is known to have all of them; None if that is not known."""
    with _opened(cache_dir) as index:
        _forget_gone(index)
        this = [str(owner.resolve()), store.folder.name, identity, store.state(), len(store)]
        row = index.execute(
            "SELECT wanted FROM complete WHERE owner = ? AND store = ? AND identity = ? AND state = ? AND items <= ?",
            this,
        ).fetchone()
    return row[0] if row and isinstance(row[0], int) and store.is_whole() else None


def _has_nothing_else(index: sqlite3.Connection, store: TensorStore) -> bool:
    """Whether it is known without reading it that a store has nothing but what the only run wants that uses it."""
    name = store.folder.name
    owners = index.execute("SELECT owner FROM owners WHERE store = ?", [name]).fetchall()
    row = index.execute(
        "SELECT 1 FROM complete JOIN owners USING (owner, store)"
        " WHERE store = ? AND state = ? AND items = wanted AND wanted = ?",
        [name, store.state(), len(store)],
    ).fetchone()
    return len(owners) == 1 and row is not None


def stores_of(cache_dir: Path, owner: Path) -> set[str]:
    """The stores from which a run wants something, or wanted something earlier."""
    with _opened(cache_dir) as index:
        rows = index.execute("SELECT store FROM owners WHERE owner = ?", [str(owner.resolve())]).fetchall()
    return {store for (store,) in rows if (cache_dir / store).is_dir()}


def delete_unwanted(cache_dir: Path, store: TensorStore, *, all_of_it: bool = False, keep: Keep | None = None) -> int:
    """Deletes the items of a store that no run wants, if they are more than half of the store or if `all_of_it` is set.
    No run may be reading them. Without `all_of_it` those that `keep` names stay; returns the bytes that these take."""
    with _opened(cache_dir) as index:
        if _has_nothing_else(index, store):
            return 0
        rows = index.execute("SELECT DISTINCT key FROM wanted WHERE store = ?", [store.folder.name])
        wanted = {key for (key,) in rows}
        keys = store.keys()
        stale = [key for key in keys if key not in wanted]
        if not stale or not (all_of_it or len(stale) > STALE_SHARE * len(keys)):
            return 0
        kept = {} if all_of_it or keep is None else _kept(index, store, set(stale), keep)
        gone = [key for key in stale if key not in kept]
        store.delete(gone)
        index.executemany(
            "DELETE FROM released WHERE store = ? AND key = ?", ((store.folder.name, key) for key in gone)
        )
    return sum(kept.values())


def _kept(index: sqlite3.Connection, store: TensorStore, stale: set[str], keep: Keep) -> dict[str, int]:
    """The stale items that stay, with their bytes."""
    oldest = time.time() - keep.days * SECONDS_PER_DAY
    rows = index.execute(
        "SELECT key FROM released WHERE store = ? AND time > ? ORDER BY time DESC, key", [store.folder.name, oldest]
    )
    recent = [key for (key,) in rows if key in stale]
    lengths, kept, room = store.lengths(recent), {}, keep.bytes
    for key in recent:
        room -= lengths[key]
        if room < 0:
            break
        kept[key] = lengths[key]
    return kept


@contextmanager
def _opened(cache_dir: Path) -> Iterator[sqlite3.Connection]:
    path = cache_dir / NAME
    cache_dir.mkdir(parents=True, exist_ok=True)
    if_damaged = "remove it; start each run that shares this cache once, so that what it wants is known again"
    with explaining_errors(path, if_damaged), closing(connected(path, timeout=BUSY_SECONDS)) as index, index:
        index.execute(
            "CREATE TABLE IF NOT EXISTS owners (owner TEXT, store TEXT, digest TEXT, PRIMARY KEY (owner, store))"
        )
        index.execute(
            "CREATE TABLE IF NOT EXISTS wanted (owner TEXT, store TEXT, key TEXT, PRIMARY KEY (owner, store, key))"
            " WITHOUT ROWID"
        )
        index.execute(
            "CREATE TABLE IF NOT EXISTS complete (owner TEXT, store TEXT, identity TEXT, state TEXT, items INTEGER,"
            " wanted INTEGER, PRIMARY KEY (owner, store))"
        )
        index.execute(
            "CREATE TABLE IF NOT EXISTS released (store TEXT, key TEXT, time REAL, PRIMARY KEY (store, key))"
            " WITHOUT ROWID"
        )
        other = "SELECT count(*) FROM owners WHERE typeof(owner) != 'text' OR typeof(store) != 'text'"
        if index.execute(other).fetchone() != (0,):
            raise UserError.of(f"is damaged: it has names that are no texts; {if_damaged}", str(path))
        yield index
