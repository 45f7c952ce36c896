"""Hands what one process of a machine has made of the data to the machine's other processes.

To make it takes a minute for a million samples, and to read it a tenth of that.
"""

from __future__ import annotations

import logging
import os
import pickle
from collections.abc import Callable
from typing import Any, TypeVar

from utils.collector import without_collector
from utils.machine import machine, memory_file, path_of
from utils.ranks import Ranks, gather

logger = logging.getLogger(__name__)

Made = TypeVar("Made")


@without_collector()
def made_once(ranks: Ranks, tag: str, make: Callable[[], Made], raise_if_stopping: Callable[[], None]) -> Made:
    """What `make` returns. The first process of each machine calls it, and the others read what that one has made. One
    that cannot makes it itself.

    Args:
        tag: unique within a run.
    """
    if ranks.world_size == 1:
        return make()
    leads = ranks.local_rank == 0
    made = make() if leads else None
    descriptor = _written(made, tag) if leads and ranks.local_size > 1 else None
    try:
        offer = [machine(), os.getpid(), descriptor]
        offers = gather(ranks, f"{tag}/made", offer, raise_if_stopping=raise_if_stopping)
        if not leads:
            made = _read(offers)
        if made is None:
            made = make()
        gather(ranks, f"{tag}/read", None, raise_if_stopping=raise_if_stopping)
    finally:
        if descriptor is not None:
            os.close(descriptor)
    return made


def _written(made: object, name: str) -> int | None:
    """The descriptor of the file that has it; None if there is no room for it."""
    descriptor = memory_file(name)
    try:
        with open(descriptor, "wb", closefd=False) as file:
            pickle.dump(made, file, protocol=pickle.HIGHEST_PROTOCOL)
    except OSError as error:
        logger.warning("every process reads the data by itself (%s)", error.strerror)
        os.close(descriptor)
        return None
    return descriptor


def _read(offers: list[list[Any]]) -> object | None:
    """What another process of this machine has made; None if there is none, or it cannot be opened."""
    own = next(((process, file) for place, process, file in offers if file is not None and place == machine()), None)
    if own is None:
        return None
    try:
        with open(path_of(*own), "rb") as file:
            return pickle.load(file)
    except OSError:
        return None
