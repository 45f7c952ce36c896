"""What a step tells of itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from utils.parallel.deciles import LossByDecile, means
from utils.parallel.step_times import StepTimes


@dataclass(frozen=True)
class StepResult:
    """Means over the micro-batches and data ranks, and the norm of the gradient before clipping. If the norm is no
    finite number, the step was not taken.

    Attributes:
        loss: of the prediction.
        terms: losses that layers added to it, by name.
        deciles: the mean loss of the step's samples by their noise level; the middle of a tenth of all that are
            trained -> loss. Only where the labels say at which level a sample is.
        seconds: of each part of the step on this process; see `StepTimes`.
    """

    loss: float
    grad_norm: float
    terms: Mapping[str, float] = field(default_factory=dict)
    deciles: Mapping[float, float] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)


class StepNumbers:
    """What the micro-batches of a step tell beside their loss, summed on the device, where they end.

    Args:
        terms: names of the losses that layers add (K).
        device: of this process.
    """

    def __init__(self, terms: Sequence[str], device: torch.device):
        self._names, self._terms_K = terms, torch.zeros(len(terms), device=device)
        self._deciles = LossByDecile(device)

    def add_terms(self, terms_K: torch.Tensor) -> None:
        """The losses that layers have added to that of a micro-batch."""
        self._terms_K += terms_K.detach()

    def add_levels(self, losses_B: torch.Tensor, labels: Any) -> None:
        """The losses of a micro-batch's samples, if its labels say at which noise levels these are."""
        if levels := getattr(labels, "levels", None):
            quantile_B, share_B = levels
            self._deciles.add(losses_B / share_B, quantile_B)

    def result(self, loss: torch.Tensor, grad_norm: torch.Tensor, micro_batches: int, times: StepTimes) -> StepResult:
        """The step's numbers, which all processes ask for together. They are read at once, since the host waits for the
        device whenever it reads.

        Args:
            loss, grad_norm: of the step, on every process.
            micro_batches: of all data ranks.
            times: of the step, which is over on the device once its numbers are here.
        """
        sums = torch.cat([self._terms_K / micro_batches, self._deciles.sums_2D.flatten()])
        if dist.is_initialized() and dist.get_world_size() > 1:
            # From the last stages to all.
            dist.all_reduce(sums)
        both = torch.stack([loss.float(), grad_norm.to(sums.device, torch.float32)])
        loss, grad_norm, *shared = torch.cat([both, sums]).tolist()
        terms, deciles = shared[: len(self._names)], shared[len(self._names) :]
        terms = dict(zip(self._names, terms, strict=True))
        return StepResult(loss, grad_norm, terms, means(deciles), times.read())
