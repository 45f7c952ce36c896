"""Targets that another model gives, of which the data has none."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Teacher:
    """Gives targets before each step.

    Attributes:
        present: a context within which the stages do what the teacher does.
        inputs: micro-batch -> what the teacher is given in its place.
        teach: (labels, the teacher's output) -> labels.
    """

    present: Callable[[], AbstractContextManager[None]]
    teach: Callable[[Any, torch.Tensor], Any]
    inputs: Callable[[Any], tuple] = lambda micro_batch: micro_batch
