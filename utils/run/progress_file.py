"""`progress.json` of a checkpoint: how far a run had come, and the settings that bind the checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

from utils.dataset.going_on import CONTINUED_KINDS, ORDER_KINDS
from utils.errors import UserError
from utils.json_files import check_types, read_json, require
from utils.run.folder import PROGRESS
from utils.run.owed import KINDS as OWED_KINDS
from utils.run.owed import OWED
from utils.run.progress import COUNT, LOSSES
from utils.run.progress import KINDS as PROGRESS_KINDS

FORMAT = 1
CHECKSUMS = "checksums.json"
CHECKSUMS_KEY = "checksums"
MADE_WITH = ("identity", "optimizer", "steps_in_epoch")
"""What a checkpoint contains about the settings with which it was made."""
KINDS = {
    "progress": dict,
    "made_with": dict,
    "ema_since": Annotated[int, 0] | None,
    "stages": Annotated[int, 1],
    "shares": Annotated[int, 1],
    OWED: dict | None,
}
MADE_WITH_KINDS = {
    "identity": dict,
    "optimizer": dict,
    "steps_in_epoch": Annotated[int, 1],
    "run": dict | None,
    "order": dict | None,
}
"""The types of the values in `progress.json` and its table `made_with`; `PROGRESS_KINDS` has those of `progress`."""


def read_progress(folder: Path, cure: str) -> dict[str, Any]:
    """What `progress.json` of a checkpoint says, with values of the right types.

    Args:
        cure: what the user can do if it is damaged.

    Raises:
        UserError: it is damaged, or of another version.
    """
    file = str(folder / PROGRESS)
    content = read_json(folder / PROGRESS, cure)
    if content.get("format") != FORMAT:
        raise UserError.of("the checkpoint is of another version of penstock", str(folder))

    def check(table: Mapping[str, Any], kinds: Mapping[str, Any], keys: Iterable[str], where: str = "") -> None:
        require(table, keys, file, cure, where)
        check_types(table, kinds, file, cure, where)

    check(content, KINDS, ("progress", "made_with"))
    made_with = content["made_with"]
    check(content["progress"], PROGRESS_KINDS | {LOSSES: COUNT}, PROGRESS_KINDS, "progress")
    check(made_with, MADE_WITH_KINDS, MADE_WITH, "made_with")
    if content.get(OWED) is not None:
        check(content[OWED], OWED_KINDS, OWED_KINDS, OWED)
    if made_with.get("order") is not None:
        check(made_with["order"], ORDER_KINDS, ORDER_KINDS, "order")
        if made_with["order"]["continued"] is not None:
            check(made_with["order"]["continued"], CONTINUED_KINDS, CONTINUED_KINDS, "continued")
    return content
