"""Requests by a file in the run's folder, as `touch RUN/save` makes one: each is obeyed after the current step, and
removed when it is done."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from utils.ranks import any_rank
from utils.run.attempts import reason_of
from utils.run.cadence import Duty

logger = logging.getLogger(__name__)

SAVE, SAVE_AND_QUIT, SAMPLE, EVALUATE, STOP = "save", "save_quit", "sample", "eval", "stop"
REQUESTS = {
    SAVE: "a checkpoint",
    SAVE_AND_QUIT: "a checkpoint, and the end of the run",
    SAMPLE: "samples",
    EVALUATE: "an evaluation",
    STOP: "a checkpoint, an export, and the end of the run",
}
"""Names of files, and what they ask for."""
OF_DUTIES = {SAMPLE: "there is no prompt in [sampling]", EVALUATE: "there are no eval_datasets"}
"""Those for which a config may have nothing, and what it lacks then."""


@dataclass(frozen=True)
class Votes:
    """What ranks say after a step.

    Attributes:
        asked: to stop, by a signal.
        is_up: the run's time.
        late: there is no time for another step.
        overdue: a checkpoint.
        writing: a checkpoint is not written yet.
        files: names of those that ask for something.
    """

    asked: bool
    is_up: bool
    late: bool
    overdue: bool
    writing: bool
    files: tuple[str, ...]

    @property
    def quits(self) -> bool:
        """Whether a file asks for the end of the run."""
        return SAVE_AND_QUIT in self.files or STOP in self.files


class FileRequests:
    """Looks for files by which the user asks for something; one process has to do it for all."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # What is done and cannot be removed would be done again and again.
        self._stuck: set[str] = set()

    def asked(self, name: str) -> bool:
        """Whether there is a file of this name."""
        is_there = (self.folder / name).is_file()
        if not is_there:
            self._stuck.discard(name)
        return is_there and name not in self._stuck

    def tell(self, names: Collection[str], step: int, due: Sequence[Duty]) -> None:
        """Tells what is done since files ask for it, and of what the duties that are `due` have nothing."""
        for name in names:
            logger.info("the file %s asks for %s after step %d", name, REQUESTS[name], step)
            if name in OF_DUTIES and not any(duty.file == name for duty in due):
                logger.warning("the file %s changes nothing: %s", name, OF_DUTIES[name])

    def done(self, names: Collection[str]) -> None:
        """Removes the files, which tells the user that it is done."""
        for name in names:
            try:
                (self.folder / name).unlink(missing_ok=True)
            except OSError as error:
                self._stuck.add(name)
                reason = reason_of(error)
                logger.warning("what %s asks for is done once, since the file cannot be removed: %s", name, reason)


def agreed(own: Sequence[bool], requests: FileRequests | None) -> Votes:
    """What any rank says, the same on every rank. A signal reaches one process, clocks differ, and one looks for files:
    the ranks have to agree, since all of them save together.

    Args:
        own: this rank's votes, in the order of `Votes`.
        requests: on the rank that looks for files.
    """
    votes = any_rank([*own, *(requests is not None and requests.asked(name) for name in REQUESTS)])
    asked = zip(REQUESTS, votes[len(own) :], strict=True)
    return Votes(*votes[: len(own)], tuple(name for name, vote in asked if vote))
