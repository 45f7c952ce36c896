"""Problems of paths in settings."""

import os
from collections.abc import Iterator
from pathlib import Path

from utils.errors import Problem


def missing(where: str, path: Path | None) -> Iterator[Problem]:
    """A path that is given and does not exist."""
    if path is not None and not os.path.exists(path):
        base = "" if path.is_absolute() else f" (seen from {Path.cwd()})"
        yield Problem("", where, f"there is no {path}{base}")


def unwritable(where: str, folder: Path) -> Iterator[Problem]:
    """A folder that cannot be written to, or cannot be created."""
    there = next(parent for parent in (folder, *folder.absolute().parents) if os.path.lexists(parent))
    if str(folder).startswith("~"):
        yield Problem("", where, f"{folder}: there is no such user; name another folder")
    elif not os.path.isdir(there):
        yield Problem("", where, f"{there} is no folder; name another")
    elif not os.access(there, os.W_OK | os.X_OK):
        yield Problem("", where, f"{there} cannot be written to; name another folder, or change its permissions")
