"""What optimizers that find their own learning rates have found."""

from __future__ import annotations

import torch

RATES = "rates"
"""Where the state of a parameter has a learning rate for each element (Automagic)."""
DISTANCE = "d"
"""Where a group has the estimate by which its learning rate is multiplied (Prodigy, D-Adaptation)."""


def distance_of(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """The largest estimate of the groups as "d", and the learning rate that follows from it as "d_times_lr"; nothing
    of optimizers without one. The host waits for nothing."""
    found = [group for group in optimizer.param_groups if isinstance(group.get(DISTANCE), int | float)]
    if not found:
        return {}
    return {
        DISTANCE: max(group[DISTANCE] for group in found),
        "d_times_lr": max(group[DISTANCE] * group["lr"] for group in found),
    }


def rates_of(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """The mean of the learning rates of all elements of this process's parameters as "mean_rate"; nothing of
    optimizers without such rates. The host waits for the device."""
    rates = [state[RATES] for state in optimizer.state.values() if torch.is_tensor(state.get(RATES))]
    if not rates:
        return {}
    sums = torch.stack([own.sum(dtype=torch.float64).to(rates[0].device) for own in rates])
    return {"mean_rate": sums.sum().item() / sum(own.numel() for own in rates)}
