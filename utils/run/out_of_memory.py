"""What is told and done when the memory of a GPU does not suffice."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from utils.device_memory import lacking, lacks_memory
from utils.errors import UserError
from utils.ranks import by_first
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
    said = f"{lacking(error)} does not suffice ({reason_of(error)})"
    return UserError.of(f"{said}{saved and f'. {saved}'}.{as_lines(savings)}", str(folder), when)


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
    saved = KEPT
    if save and _is_untouched(parts):
        let_go(error)
        # Several ranks may have no memory.
        saved = by_first(parts.ranks, f"saved before {step}", lambda: _saved(parts, save)) or KEPT
    return explained(error, parts.ways(step), parts.folder, step, saved)


def _is_untouched(parts: RunParts) -> bool:
    """Whether this rank has what the step began with: it has not begun to change that, and if others wait for it in the
    step, so that they cannot save along, it has all of it, in no block that is on its way."""
    settings = parts.settings
    if parts.shares.is_stepping or settings.optimizer.gradient_release:
        return False
    shared = parts.ranks.stages > 1 or parts.shares.divided or settings.swaps_trained
    return parts.ranks.world_size == 1 or not shared


def _saved(parts: RunParts, save: Callable[[], object]) -> str:
    """Saves what a step began with that found no memory. Returns what is told of it."""
    try:
        if parts.ranks.world_size == 1:
            parts.engine.zero_grad()
            parts.engine.module.swap.settle()
            if parts.ranks.device.type == "cuda":
                torch.cuda.empty_cache()
            save()
        else:
            _save_beside(parts, save)
    except Exception as failure:
        return f"{KEPT}, and the steps since could not be saved: {reason_of(failure)}"
    return "What the steps before it made is saved, and --resume_from_checkpoint goes on from there"


def _save_beside(parts: RunParts, save: Callable[[], object]) -> None:
    """Saves where other ranks wait for this one in sums of gradients. What the device still does may wait for them, so
    nothing here waits for that: the state is copied beside it, and the allocator keeps what is free.

    Raises:
        UserError: the run's folder is not there, as on another machine than the main rank's.
    """
    if not parts.folder.is_dir():
        raise UserError.of("is not to be seen from this machine", str(parts.folder))
    stream = torch.cuda.Stream() if parts.ranks.device.type == "cuda" else None
    with torch.cuda.stream(stream):
        save()
