"""Steps whose loss or gradient is not a finite number."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from math import isfinite
from pathlib import Path

from utils.errors import UserError
from utils.parallel.step_numbers import StepResult
from utils.run.folder import LATEST, checkpoints_before

logger = logging.getLogger(__name__)

FILES_TOLD = 20
_NONE = "the weights stay as they were"
_EACH_LAYER = "layers stay as they were whose gradients are not finite, and the others have moved"


class NonFiniteSteps:
    """Counts them, and tells what they were made of.

    Args:
        most: so many in a row are too many.
        by_layer: whether each layer is stepped by itself, if its own gradient is finite.

    Attributes:
        in_all: since the start.
    """

    def __init__(self, most: int, *, by_layer: bool = False) -> None:
        self._most = most
        self._stays = _EACH_LAYER if by_layer else _NONE
        self._in_a_row = 0
        self.in_all = 0

    @property
    def are_too_many(self) -> bool:
        """Whether training cannot go on."""
        return self._in_a_row >= self._most

    def follow(self, step: int, result: StepResult, files: Callable[[], Sequence[str]]) -> bool:
        """Whether a step was finite; tells it if it was not.

        Args:
            step: its number, the first being 1.
            files: those of its samples, over all data ranks.
        """
        if is_finite(result):
            self._in_a_row = 0
            return True
        self._in_a_row += 1
        self.in_all += 1
        names = list(dict.fromkeys(files()))
        more = f", and {len(names) - FILES_TOLD} more" if len(names) > FILES_TOLD else ""
        kept = "the weights have moved" if isfinite(result.grad_norm) else self._stays
        logger.warning(
            "step %d: loss %g, gradient norm %g: %s. Its samples: %s%s",
            step,
            result.loss,
            result.grad_norm,
            kept,
            ", ".join(names[:FILES_TOLD]),
            more,
        )
        return False


def is_finite(result: StepResult) -> bool:
    """Whether loss and gradient are finite numbers."""
    return isfinite(result.loss) and isfinite(result.grad_norm)


def diverged(folder: Path, step: int, result: StepResult, saved: str) -> UserError:
    """The error of a run that cannot go on after this step, and from where it may.

    Args:
        saved: what of it is.
    """
    checkpoints = checkpoints_before(folder / LATEST)
    way_on = "There is no checkpoint to go on from: start again"
    if checkpoints:
        way_on = f"Go on from a checkpoint (the newest is --resume_from_checkpoint {checkpoints[-1]})"
    return UserError.of(
        f"loss {result.loss}, gradient norm {result.grad_norm}: training has diverged, and {saved}. {way_on} with a "
        "lower [optimizer] lr or more warmup_steps; or base files are damaged, which [model] verify_files = "
        '"always" looks for',
        str(folder),
        f"step {step}",
    )
