"""What is told when one of the cache's SQLite files cannot be read or written."""

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
"""The part of an error's code that says its kind."""


@contextmanager
def explaining_errors(path: Path, if_damaged: str) -> Iterator[None]:
    """While a database is used: a full disk, a file that is damaged, a folder that cannot be written to.

    Args:
        if_damaged: what to do about a file that is no database any more, and what that costs.

    Raises:
        UserError: it cannot be used; why, and how to mend it.
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
