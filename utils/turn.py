"""A process that does one run of a list of configs, and what it tells the one that walks the list; see
`utils/run/listed.py`."""

from __future__ import annotations

import os
from pathlib import Path

TURN, TOLD = "PENSTOCK_TURN", "PENSTOCK_TOLD"
"""Names in the environment: which run of the list this is, and the file in which it names its folder."""


def turn_in_list() -> int | None:
    """Which run of a list this process is for, from 1 on; None if it is for no list."""
    turn = os.environ.get(TURN)
    return int(turn) if turn else None


def tell_folder(folder: Path) -> None:
    """Tells the process that walks the list, if there is one, where the run's folder is."""
    if told := os.environ.get(TOLD):
        Path(told).write_text(str(folder.absolute()), encoding="utf-8")
