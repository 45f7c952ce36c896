"""Which items of a cache are still wanted, and by whom: what nobody wants any more can go."""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from utils.dataset.databases import explaining_errors
from utils.dataset.tensor_store import TensorStore

NAME = "references.sqlite"
BUSY_SECONDS = 120
STALE_SHARE = 0.5


def remember(cache_dir: Path, store: str, owner: Path, keys: Iterable[str]) -> None:
    """Notes that the run whose settings are in the file `owner` wants these items of a store, and of that store no
    others any more. Owners whose file is gone want nothing."""
    keys = sorted(keys)
    digest = hashlib.blake2b("".join(keys).encode(), digest_size=16).hexdigest()
    with _opened(cache_dir) as index:
        gone = [name for (name,) in index.execute("SELECT DISTINCT owner FROM owners") if not Path(name).exists()]
        for name in gone:
            index.execute("DELETE FROM owners WHERE owner = ?", [name])
            index.execute("DELETE FROM wanted WHERE owner = ?", [name])
        this = [str(owner.resolve()), store]
        if index.execute("SELECT digest FROM owners WHERE owner = ? AND store = ?", this).fetchone() == (digest,):
            return
        index.execute("DELETE FROM wanted WHERE owner = ? AND store = ?", this)
        index.executemany("INSERT INTO wanted VALUES (?, ?, ?)", ((*this, key) for key in keys))
        index.execute("INSERT OR REPLACE INTO owners VALUES (?, ?, ?)", [*this, digest])


def stores_of(cache_dir: Path, owner: Path) -> set[str]:
    """The stores of which a run wants something, or once did."""
    with _opened(cache_dir) as index:
        rows = index.execute("SELECT store FROM owners WHERE owner = ?", [str(owner.resolve())]).fetchall()
    return {store for (store,) in rows if (cache_dir / store).is_dir()}


def delete_unwanted(cache_dir: Path, store: TensorStore, *, all_of_it: bool = False) -> None:
    """Deletes the items of a store that nobody wants, if they are more than half of it, or whenever `all_of_it` is to
    go. No run may be reading them."""
    with _opened(cache_dir) as index:
        rows = index.execute("SELECT DISTINCT key FROM wanted WHERE store = ?", [store.folder.name])
        wanted = {key for (key,) in rows}
    keys = store.keys()
    stale = [key for key in keys if key not in wanted]
    if stale and (all_of_it or len(stale) > STALE_SHARE * len(keys)):
        store.delete(stale)


@contextmanager
def _opened(cache_dir: Path) -> Iterator[sqlite3.Connection]:
    path = cache_dir / NAME
    cache_dir.mkdir(parents=True, exist_ok=True)
    if_damaged = "remove it; start each run that shares this cache once, so that what it wants is known again"
    with explaining_errors(path, if_damaged), closing(sqlite3.connect(path, timeout=BUSY_SECONDS)) as index, index:
        index.execute(
            "CREATE TABLE IF NOT EXISTS owners (owner TEXT, store TEXT, digest TEXT, PRIMARY KEY (owner, store))"
        )
        index.execute(
            "CREATE TABLE IF NOT EXISTS wanted (owner TEXT, store TEXT, key TEXT, PRIMARY KEY (owner, store, key))"
            " WITHOUT ROWID"
        )
        yield index
