"""What was due after a step and is not done: part of that step's checkpoint, and the first thing that a run does when
it goes on from there.

A checkpoint is written before evaluation and samples, so that `progress.json` says what follows; `done.json` beside it
says what of that has been done since, as the one file of a checkpoint that changes.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from utils.errors import UserError
from utils.json_files import read_json
from utils.run.attempts import reason_of
from utils.run.durable import replace_text
from utils.run.progress import Progress

logger = logging.getLogger(__name__)

OWED = "owed"
KINDS = {"duties": list[str], "epoch_ended": bool}
"""The types of what `Owed.as_dict` says."""
DONE = "done.json"


@dataclass(frozen=True)
class Owed:
    """What is still to be done after a step.

    Attributes:
        progress: after the step, in its own epoch.
        epoch_ended: whether the step was its epoch's last.
        duties: their names, in order.
    """

    progress: Progress
    epoch_ended: bool = False
    duties: tuple[str, ...] = ()

    def without(self, duty: str) -> Owed:
        return replace(self, duties=tuple(name for name in self.duties if name != duty))

    def as_dict(self) -> dict[str, Any]:
        return {"duties": list(self.duties), "epoch_ended": self.epoch_ended}


def owed_in(content: Mapping[str, Any], progress: Progress) -> Owed:
    """What a checkpoint owed when it was written.

    Args:
        content: of `progress.json`, its types checked; that of an earlier version says nothing, and nothing is owed.
        progress: of the checkpoint, which may be at the beginning of an epoch.
    """
    says = content.get(OWED)
    if says is None:
        return Owed(progress)
    ended = says["epoch_ended"]
    return Owed(replace(progress, epoch=progress.epoch - ended), ended, tuple(says["duties"]))


def done_since(checkpoint: Path) -> list[str]:
    """The duties that were done after a checkpoint of their step had been written. What cannot be read is told, and
    counts as not done."""
    path = checkpoint / DONE
    if not path.exists():
        return []
    try:
        return read_json(path, kinds={"done": list[str]})["done"]
    except (UserError, KeyError) as error:
        logger.warning("%s cannot be read, and what was due is done again: %s", path, reason_of(error))
        return []


def note_done(checkpoint: Path, duty: str) -> None:
    """Notes beside a checkpoint that this duty of its step is done, or has failed."""
    try:
        replace_text(checkpoint / DONE, json.dumps({"done": [*done_since(checkpoint), duty]}))
    except OSError as error:
        logger.warning("a run that goes on from %s will do %s again: %s", checkpoint, duty, reason_of(error))
