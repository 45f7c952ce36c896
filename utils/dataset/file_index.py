"""The index of a dataset's files: what was once found out about them, by a scan of this run or an earlier one."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from utils.dataset.databases import connected, explaining_errors
from utils.errors import UserError

BUSY_SECONDS = 60
VERSION = 3
"""To be changed when files would be measured otherwise than before; what older indices hold is then forgotten."""


@dataclass(frozen=True)
class Scan:
    """How files are examined.

    Attributes:
        index: the SQLite file that stores identities; created if missing. The indices of tars lie beside it.
        trust: assume that known files are unchanged, without looking at them.
        verify: hash every file, regardless of its size and modification time.
        progress: show a progress bar.
        raise_if_stopping: called between files; an exception ends the scan, and everything found so far is stored.
    """

    index: Path
    trust: bool = False
    verify: bool = False
    progress: bool = False
    raise_if_stopping: Callable[[], None] = lambda: None


@contextmanager
def opened_index(path: Path) -> Iterator[sqlite3.Connection]:
    """The index, whose tables exist.

    Raises:
        UserError: its folder cannot be made, or it is damaged.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        what = f"this folder for the cache cannot be made ({error.strerror}); name another in cache_dir or output_dir"
        raise UserError.of(what, str(path.parent)) from error
    if_damaged = "remove it; all files are looked at again, and nothing is encoded again"
    with explaining_errors(path, if_damaged), closing(connected(path, timeout=BUSY_SECONDS)) as index:
        # What an older version of this program found may be wrong: it took one tile of a HEIF for the picture, and did
        # not ask for the profiles of colours, or whether inks have one.
        if index.execute("PRAGMA user_version").fetchone() != (VERSION,):
            index.execute("DROP TABLE IF EXISTS media")
            index.execute(f"PRAGMA user_version = {VERSION}")
        index.execute(
            "CREATE TABLE IF NOT EXISTS media (path TEXT, part TEXT, size INTEGER, mtime_ns INTEGER, digest TEXT,"
            " width INTEGER, height INTEGER, frames INTEGER, rate REAL, fault TEXT, colours TEXT,"
            " PRIMARY KEY (path, part)) WITHOUT ROWID"
        )
        index.execute(
            "CREATE TABLE IF NOT EXISTS masks (digest TEXT, is_alpha INTEGER, mean REAL,"
            " PRIMARY KEY (digest, is_alpha)) WITHOUT ROWID"
        )
        index.commit()
        yield index
