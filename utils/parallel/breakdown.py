"""What the stages do in the time of a step: the seconds of each kind of instruction of the schedule."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist

logger = logging.getLogger(__name__)

Handler = Callable[..., None]


class Breakdown:
    """Measures instructions, each of which is waited for.

    Args:
        device: which computes.
        stage: of this process; None if another process of it is to tell.
    """

    def __init__(self, device: torch.device, stage: int | None):
        self._device, self._stage = device, stage
        self._seconds: Counter[str] = Counter()

    def timed(self, handlers: Mapping[type, Handler]) -> dict[type, Handler]:
        """The handlers of instructions, which also measure."""
        return {kind: self._timed(kind.__name__, handler) for kind, handler in handlers.items()}

    def _timed(self, name: str, handler: Handler) -> Handler:
        def run(*arguments: Any, **keys: Any) -> None:
            started = self._now()
            handler(*arguments, **keys)
            self._seconds[name] += self._now() - started

        return run

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def tell(self, step: int) -> None:
        """Logs what was measured since the last call, of every stage; all processes call it together."""
        measured = self._stage, dict(self._seconds)
        self._seconds.clear()
        of_all = [measured] * dist.get_world_size()
        dist.all_gather_object(of_all, measured)
        for stage, seconds in of_all:
            if stage is not None:
                parts = ", ".join(f"{name} {value:.4f}" for name, value in seconds.items())
                logger.info("step %d, seconds of stage %d: %s", step + 1, stage, parts)
