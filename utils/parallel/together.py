"""What the stages of an optimizer do together that sums over all parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn


def numbers_of_all(
    device: torch.device, group: dist.ProcessGroup | None
) -> Callable[[Sequence[float]], list[list[float]]]:
    """Some numbers of this process -> those of every process that steps other parameters, which all call it together.

    Args:
        device: of this process, with which its group communicates.
        group: those processes; None for all.
    """

    def gathered(numbers: Sequence[float]) -> list[list[float]]:
        if not dist.is_initialized() or dist.get_world_size(group) == 1:
            return [list(numbers)]
        own = torch.tensor(numbers, dtype=torch.float64, device=device)
        of_all = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
        dist.all_gather(of_all, own, group=group)
        return torch.stack(of_all).tolist()

    return gathered


def groups_for_frozen_stage(lr: float) -> list[dict[str, Any]]:
    """What is stepped on a stage without trainable parameters, which takes part in the sums of others."""
    return [{"params": [nn.Parameter(torch.zeros(()))], "names": [], "lr": lr, "initial_lr": lr, "weight_decay": 0.0}]


def optimizer_for_frozen_stage() -> torch.optim.Optimizer:
    """The optimizer of a stage without trainable parameters, since DeepSpeed requires one."""
    return torch.optim.SGD([{"params": [nn.Parameter(torch.zeros(()))], "initial_lr": 0.0}], lr=0.0)
