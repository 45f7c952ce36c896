"""Targets that come from another prediction instead of the data."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Teacher:
    """Computes targets before each step.

    Attributes:
        present: a context in which the stages compute the teacher's predictions.
        inputs: micro-batch -> the micro-batch that the teacher sees.
        teach: (labels, the teacher's output) -> labels.
    """

    present: Callable[[], AbstractContextManager[None]]
    teach: Callable[[Any, torch.Tensor], Any]
    inputs: Callable[[Any], tuple] = lambda micro_batch: micro_batch
