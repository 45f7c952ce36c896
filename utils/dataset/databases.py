"""Explains errors of the cache's SQLite files."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from utils.errors import UserError

DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
OUR_MISTAKES = (sqlite3.ProgrammingError, sqlite3.IntegrityError, sqlite3.DataError)
PRIMARY = 0xFF
"""The part of an error code that says what kind of error it is."""


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
        free = shutil.disk_usage(path.parent).free
        what = f"cannot be used ({error}, with {free:,} bytes free on its disk); mend this and start again"
        raise UserError.of(f"{what}, what was cached is kept", str(path)) from error
