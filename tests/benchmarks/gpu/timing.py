"""How long something takes on the device."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

GIB = 2**30


def median_seconds(action: Callable[[], Any], *, runs: int, warm_up: int = 2) -> float:
    """The median of some runs after others, each from an idle device until it is idle again."""
    for _ in range(warm_up):
        action()
    taken = []
    for _ in range(runs):
        torch.cuda.synchronize()
        started = time.perf_counter()
        action()
        torch.cuda.synchronize()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)
