"""Whether evaluations still gain, for a run that is to stop when they do not."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from math import inf, isnan

logger = logging.getLogger(__name__)


class Patience:
    """Judges on the main rank, which alone has the numbers; the ranks agree on `is_over` among themselves.

    Args:
        evaluations: without a new lowest loss, after which it is over; None for never.
        loss: name of the loss that counts.
    """

    def __init__(self, evaluations: int | None = None, loss: str = ""):
        self.evaluations, self.loss = evaluations, loss
        self.is_over = False

    def follow(self, points: Sequence[tuple[float, float]]) -> None:
        """Looks at all (step, loss) that the run has measured."""
        if self.evaluations is None or not points:
            return
        losses = [loss for _, loss in points]
        # The first of equal ones: as low as before is no gain. What is no number is none either.
        best = min(range(len(losses)), key=lambda index: inf if isnan(losses[index]) else losses[index])
        self.is_over = len(losses) - 1 - best >= self.evaluations
        if self.is_over:
            logger.warning(
                "eval_patience: %s was lowest at step %d, %.5f, and %d evaluations since have gained nothing: the run "
                "ends here",
                self.loss,
                points[best][0],
                losses[best],
                len(losses) - 1 - best,
            )
