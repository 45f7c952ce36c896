"""What is told and done when the memory of a GPU does not suffice."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from utils.device_memory import lacks_memory
from utils.errors import UserError
from utils.run.attempts import as_lines, let_go, reason_of

if TYPE_CHECKING:
    from utils.run.parts import RunParts
    from utils.run.savings import Saving

KEPT = "What was saved before stays"


def explained(error: Exception, savings: Iterable[Saving], folder: Path, when: str, saved: str = KEPT) -> UserError:
    """The error with what would save memory, that first which costs least.

    Args:
        saved: what is told of the steps before.
    """
    told = f"the GPU's memory does not suffice ({reason_of(error)}){saved and f'. {saved}'}.{as_lines(savings)}"
    return UserError.of(told, str(folder), when)


@contextmanager
def explaining(
    savings: Callable[[], Iterable[Saving]], folder: Path, when: Callable[[], str], saved: str = KEPT
) -> Iterator[None]:
    """A context in which what finds no memory ends with such an error."""
    try:
        yield
    except RuntimeError as error:
        if not lacks_memory(error):
            raise
        # What it holds is in nobody's way then.
        let_go(error)
        raise explained(error, savings(), folder, when(), saved) from error


def in_step(error: RuntimeError, parts: RunParts, step: str, save: Callable[[], object] | None) -> UserError:
    """The error of a step that found no memory.

    Args:
        step: as it is called.
        save: what the step began with; None if that is saved already, or is not there any more.
    """
    saved = _save_before(error, parts, save) if save else KEPT
    return explained(error, parts.ways(step), parts.folder, step, saved)


def _save_before(error: RuntimeError, parts: RunParts, save: Callable[[], object]) -> str:
    """Lets go what a step has made that found no memory, and saves what it began with: where it has not begun to change
    that, and no other rank, which waits for this one in the step, has to save along. Returns what is told of it."""
    if parts.ranks.world_size > 1 or parts.shares.is_stepping or parts.settings.optimizer.gradient_release:
        return KEPT
    let_go(error)
    parts.engine.zero_grad()
    try:
        parts.engine.module.swap.settle()
        if parts.ranks.device.type == "cuda":
            torch.cuda.empty_cache()
        save()
    except Exception as failure:
        return f"{KEPT}, and the steps since could not be saved: {reason_of(failure)}"
    return "What the steps before it made is saved, and --resume_from_checkpoint goes on from there"
