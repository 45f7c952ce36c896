"""The time of a step in its parts, without a wait for the device: events are recorded among its work, and read when the
step's own numbers have been read, since all of them are over then."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any

import torch
from deepspeed.runtime.pipe import schedule

COMPUTE, COMMUNICATION, OPTIMIZER = "compute", "communication", "optimizer"
PARTS: Mapping[type, str] = {
    schedule.ForwardPass: COMPUTE,
    schedule.BackwardPass: COMPUTE,
    schedule.RecvActivation: COMMUNICATION,
    schedule.SendActivation: COMMUNICATION,
    schedule.RecvGrad: COMMUNICATION,
    schedule.SendGrad: COMMUNICATION,
    schedule.ReduceGrads: COMMUNICATION,
    schedule.ReduceTiedGrads: COMMUNICATION,
    schedule.OptimizerStep: OPTIMIZER,
}
"""By instruction of the schedule. A stage that has to wait for its neighbour waits in what it receives."""


class StepTimes:
    """Measures the instructions of a step on this process.

    Args:
        device: whose time it is; a CPU's is that of the process.
    """

    def __init__(self, device: torch.device):
        self._on_device = device.type == "cuda"
        self._marks: list[tuple[str, Any, Any]] = []
        self._free: list[torch.cuda.Event] = []
        self._measures = False

    def begin(self) -> None:
        """The step begins; nothing else is measured, such as evaluation."""
        self._forget()
        self._measures = True

    def timed(self, handlers: Mapping[type, Callable[..., None]]) -> dict[type, Callable[..., None]]:
        """The handlers of instructions, which also measure."""
        return {kind: self._timed(PARTS[kind], own) if kind in PARTS else own for kind, own in handlers.items()}

    def _timed(self, part: str, handler: Callable[..., None]) -> Callable[..., None]:
        @wraps(handler)
        def run(*arguments: Any, **keys: Any) -> None:
            if not self._measures:
                handler(*arguments, **keys)
                return
            started = self._now()
            handler(*arguments, **keys)
            self._marks.append((part, started, self._now()))

        return run

    def _now(self) -> Any:
        if not self._on_device:
            return time.perf_counter()
        event = self._free.pop() if self._free else torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def read(self) -> dict[str, float]:
        """The seconds of each part of the step. The host has waited for the device since."""
        seconds = dict.fromkeys((COMPUTE, COMMUNICATION, OPTIMIZER), 0.0)
        for part, started, ended in self._marks:
            seconds[part] += started.elapsed_time(ended) / 1000 if self._on_device else ended - started
        self._forget()
        return seconds

    def _forget(self) -> None:
        if self._on_device:
            self._free += (event for _, *both in self._marks for event in both)
        self._marks.clear()
        self._measures = False
