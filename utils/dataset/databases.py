"""Explains errors of the cache's SQLite files."""

from __future__ import annotations

import os
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from utils.errors import UserError

DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
OUR_MISTAKES = (sqlite3.ProgrammingError, sqlite3.IntegrityError, sqlite3.DataError)
NOT_OURS = (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM)
FOR_THE_GROUP = (
    "this user may not write it: let its owner `chmod -R g+rwX` the cache's folder, and start runs that share a cache "
    "under `umask 002`; or name another in cache_dir"
)
PRIMARY = 0xFF
"""The part of an error code that says what kind of error it is."""


def connected(path: Path, **how: Any) -> sqlite3.Connection:
    """A connection to a database, which is made if it is missing, with the permissions that the umask gives. SQLite
    itself never lets a group write; the files beside it have the permissions of the database."""
    # If it cannot be made, SQLite says so.
    with suppress(OSError):
        path.open("xb").close()
    return sqlite3.connect(path, **how)


def _is_ours(path: Path) -> bool:
    may = partial(os.access, effective_ids=True)
    return may(path.parent, os.W_OK) and (not path.exists() or may(path, os.R_OK | os.W_OK))


@contextmanager
def explaining_errors(path: Path, if_damaged: str) -> Iterator[None]:
    """Turns errors of a database within this context (a full disk, a damaged file, a read-only folder) into messages.

    Args:
        if_damaged: what the user should do about a file that is no longer a database, and what that costs.

    Raises:
        UserError: the database cannot be used; says why, and how to mend it.
    """
    try:
        yield
    except sqlite3.DatabaseError as error:
        if isinstance(error, OUR_MISTAKES):
            raise
        if getattr(error, "sqlite_errorcode", 0) & PRIMARY in DAMAGED:
            raise UserError.of(f"is damaged ({error}); {if_damaged}", str(path)) from error
        if getattr(error, "sqlite_errorcode", 0) & PRIMARY in NOT_OURS and not _is_ours(path):
            raise UserError.of(f"cannot be used ({error}); {FOR_THE_GROUP}", str(path)) from error
        free = shutil.disk_usage(path.parent).free
        what = f"cannot be used ({error}, with {free:,} bytes free on its disk); mend this and start again"
        raise UserError.of(f"{what}, what was cached is kept", str(path)) from error
