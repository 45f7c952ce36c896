"""Files that are on disk when the call returns, also after a power failure."""

from __future__ import annotations

import errno
import os
from pathlib import Path

NOT_FOR_FOLDERS = (errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES)
"""What some network file systems answer if a folder is to be synced."""


def sync_folder(folder: Path) -> None:
    """Lets the names in a folder be on disk."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except PermissionError:
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NOT_FOR_FOLDERS:
            raise
    finally:
        os.close(descriptor)


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file, of which an error names the path."""
    try:
        with path.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def replace_text(path: Path, text: str) -> None:
    """Writes a small file so that it always holds either the old or the new text."""
    beside = path.with_name(path.name + ".new")
    try:
        write_bytes(beside, text.encode())
        os.replace(beside, path)
    except OSError:
        beside.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)
