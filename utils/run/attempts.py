"""Work between two steps that may fail without an end of the training: all ranks learn of it and leave it together."""

from __future__ import annotations

import errno
import logging
import traceback
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, TypeVar

from utils.device_memory import lacks_memory
from utils.errors import UserError
from utils.ranks import Ranks, any_rank, gather
from utils.run.signals import StopRequested

if TYPE_CHECKING:
    from utils.run.savings import Saving

logger = logging.getLogger(__name__)

Result = TypeVar("Result")
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""There is no room on the disk, for this user, or for a file of this size."""


class Failed(Exception):
    """The work failed on some rank, and all have left it; as a string, why."""


def reason_of(error: Exception) -> str:
    """Why something failed, in one line as far as the error says it."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    if isinstance(error, UserError):
        return "; ".join(": ".join(part for part in (p.file, p.where, p.message) if part) for p in error.problems)
    if lacks_memory(error):
        return ". ".join(str(error).split("\n")[0].split(". ")[:2])
    return f"{type(error).__name__}: {error}"


def is_expected(error: Exception) -> bool:
    """Whether the reason explains such an error, so that nobody needs its traceback."""
    return isinstance(error, OSError | UserError) or lacks_memory(error)


def as_lines(savings: Iterable[Saving]) -> str:
    """What to set, for the end of an error, whose first line says what has happened."""
    listed = "\n".join(f"    - {saving}" for saving in savings)
    return f"\n  To need less, in this order:\n{listed}\n  --check tells how much each of them needs"


def advised(error: Exception, savings: Callable[[], Iterable[Saving]]) -> str:
    """Why something failed, in one line; and what to set if it found no memory."""
    told = "; ".join(saving.says for saving in savings()) if lacks_memory(error) else ""
    return f"{reason_of(error)}; what would take less: {told}" if told else reason_of(error)


def let_go(error: BaseException | None) -> None:
    """Empties the frames in which an error was met, also those that led to it. They hold all that was made there, such
    as what fills a GPU; and who keeps the error is mostly held by one of them, so that it would stay until Python's
    collector comes by."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


class Attempt:
    """Work of all ranks, in pieces between which they meet.

    Args:
        name: one that no other attempt of the run has.
        stopping: whether this process was asked to stop.
        savings: -> what to set if the GPU's memory does not suffice for it.
    """

    def __init__(
        self,
        name: str,
        ranks: Ranks,
        stopping: Callable[[], bool] = lambda: False,
        savings: Callable[[], Iterable[Saving]] = tuple,
    ):
        self.name, self.ranks, self.stopping, self.savings = name, ranks, stopping, savings
        self.error: Exception | None = None

    def alone(self, work: Callable[..., Result], *arguments: Any) -> Result | None:
        """Does what waits for no other rank. An error is kept until the ranks meet, and nothing more is done."""
        if self.error is not None:
            return None
        try:
            return work(*arguments)
        except StopRequested:
            raise
        except Exception as error:
            let_go(error)
            self.error = error
            return None

    def in_pipeline(self, work: Callable[..., Result], *arguments: Any, all_ranks: bool = False) -> Result | None:
        """Does what the stages of a pipeline do hand in hand, or `all_ranks`; they have met just before.

        Raises:
            UserError: it failed on this rank, for which the others wait, so that the run has to end.
        """
        if self.ranks.stages == 1 and not all_ranks:
            return self.alone(work, *arguments)
        try:
            return work(*arguments)
        except Exception as error:
            if not is_expected(error):
                raise
            who = f"on rank {self.ranks.rank}" if all_ranks else f"in stage {self.ranks.stage}"
            others = "ranks" if all_ranks else "stages"
            advice = f".{as_lines(self.savings())}" if lacks_memory(error) else ""
            raise UserError.of(
                f"{reason_of(error)}. It failed {who}, for which the other {others} wait, so that the run ends here. "
                f"What was saved before stays: --resume_from_checkpoint goes on{advice}",
                where=self.name,
            ) from error

    def meet(self) -> None:
        """Waits for the other ranks.

        Raises:
            Failed: on every rank, if the work failed on one.
            StopRequested: on every rank, if one was asked to stop.
        """
        votes = [self.error is not None, self.stopping()]
        # A rank may work alone where the others are not to be had.
        failed, stopping = any_rank(votes) if self.ranks.world_size > 1 else votes
        if failed:
            if self.error is not None and not is_expected(self.error):
                logger.error("%s failed:", self.name, exc_info=self.error)
            reasons = gather(self.ranks, f"failed/{self.name}", self.error and advised(self.error, self.savings))
            rank, reason = next((rank, reason) for rank, reason in enumerate(reasons) if reason is not None)
            raise Failed(f"{reason} (on rank {rank})" if self.ranks.world_size > 1 else reason) from self.error
        if stopping:
            raise StopRequested
