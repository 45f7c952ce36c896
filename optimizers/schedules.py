"""The learning rate as a function of the step only, so that resuming needs no state."""

import logging
from collections.abc import Callable, Mapping, Sequence
from math import cos, pi

from utils.settings.schema import Settings

logger = logging.getLogger(__name__)

# By kind: the factor at a fraction of the way from the end of warm-up (0) to the end of the last step (1).
_COURSES: Mapping[str, Callable[[float], float]] = {
    "constant": lambda share: 1.0,
    "linear": lambda share: 1.0 - share,
    "cosine": lambda share: 0.5 * (1.0 + cos(pi * share)),
}


def factor(step: int, *, kind: str, warmup_steps: int, total_steps: int) -> float:
    """The factor on the learning rate at `step`, counted from 0.

    Warm-up rises by 1 / (warmup_steps + 1) per step, so that no step is lost to a rate of 0, and reaches 1 at
    step `warmup_steps`. From there `linear` and `cosine` fall to 0 at step `total_steps`, the first that is
    not taken. `cosine` is that of SGDR (Loshchilov and Hutter 2017, equation 5) without restarts.
    """
    assert step >= 0, step
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    share = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return _COURSES[kind](min(1.0, share))


def warn_of_warmup(settings: Settings, total_steps: float) -> None:
    """Tells if the learning rate does not come to its full value in `total_steps`."""
    if settings.force_constant_lr is None and 0 < total_steps <= settings.warmup_steps:
        highest = factor(int(total_steps) - 1, kind="constant", warmup_steps=settings.warmup_steps, total_steps=1)
        logger.warning(
            "key `warmup_steps`: the run has %d steps, and warm-up takes %d: the learning rate comes to %.0f %% of lr",
            total_steps,
            settings.warmup_steps,
            100 * highest,
        )


def learning_rates(step: int, base_lrs: Sequence[float], settings: Settings, total_steps: int) -> list[float]:
    """The learning rate of each parameter group at `step`, given the rates after warm-up."""
    if settings.force_constant_lr is not None:
        return [settings.force_constant_lr] * len(base_lrs)
    scale = factor(step, kind=settings.lr_scheduler, warmup_steps=settings.warmup_steps, total_steps=total_steps)
    return [base * scale for base in base_lrs]
