"""Hands what one process of a machine has made of the data to the machine's other processes, by a file.

To make it takes a minute for a million samples, and to read it a tenth of that.
"""

from __future__ import annotations

import hashlib
import logging
import os
import pickle
import platform
from collections.abc import Callable
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import TypeVar

from utils.collector import without_collector
from utils.ranks import Ranks, gather

logger = logging.getLogger(__name__)

BOOT = Path("/proc/sys/kernel/random/boot_id")
"""Differs between machines that have the same name."""
PIECE_BYTES = 2**20

Made = TypeVar("Made")


@without_collector()
def made_once(
    ranks: Ranks, tag: str, folder: Path, make: Callable[[], Made], raise_if_stopping: Callable[[], None]
) -> Made:
    """What `make` returns. The first process of each machine calls it, and the others read what that one has made. One
    that cannot, since the file is not there or is another, makes it itself.

    Args:
        tag: unique within a run.
        folder: where the file lies until all have read it.
    """
    if ranks.world_size == 1:
        return make()
    leads = ranks.local_rank == 0
    made = make() if leads else None
    offer = _written(made, folder) if leads and ranks.local_size > 1 else None
    offers = gather(ranks, f"{tag}/made", offer, raise_if_stopping=raise_if_stopping)
    if not leads:
        own = next((one for one in offers if one and one[0] == _machine()), None)
        made = _read(own) if own else None
    if made is None:
        made = make()
    gather(ranks, f"{tag}/read", None, raise_if_stopping=raise_if_stopping)
    if offer:
        Path(offer[1]).unlink(missing_ok=True)
    return made


def _machine() -> str:
    boot = BOOT.read_text().strip() if BOOT.exists() else ""
    return f"{platform.node()} {boot}"


def _written(made: object, folder: Path) -> list[str] | None:
    """[machine, file, hash of its content]; None if there is no room for it."""
    file = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Nobody else may write it: to read it runs what it says.
        with NamedTemporaryFile(dir=folder, prefix="samples-", suffix=".pickle", delete=False) as file:
            pickle.dump(made, file, protocol=pickle.HIGHEST_PROTOCOL)
        return [_machine(), file.name, _hash(Path(file.name))]
    except OSError as error:
        logger.warning("%s: every process reads the data by itself (%s)", folder, error.strerror)
        if file:
            Path(file.name).unlink(missing_ok=True)
        return None


def _read(offer: list[str]) -> object | None:
    """What another process of this machine has written; None if it is not there, or is not that."""
    _, name, digest = offer
    try:
        if _hash(Path(name)) != digest or os.stat(name).st_uid != os.getuid():
            return None
        with open(name, "rb") as file:
            return pickle.load(file)
    except OSError:
        return None


def _hash(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while piece := file.read(PIECE_BYTES):
            digest.update(piece)
    return digest.hexdigest()
