"""What the optimizers of libraries have in common."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch

from optimizers.kinds import Groups, State


def of_library(path: str, **fixed: Any) -> Callable[..., torch.optim.Optimizer]:
    """What builds the optimizer of a class that is imported when it is needed, since some take seconds.

    Args:
        path: module and class, with a dot between.
        fixed: further arguments.
    """
    module, _, name = path.rpartition(".")

    def build(groups: Groups, **keys: Any) -> torch.optim.Optimizer:
        return getattr(import_module(module), name)(groups, **keys, **fixed)

    return build


def of_its_type(parameter: torch.Tensor, value: torch.Tensor, state: State) -> State:
    """The state of an optimizer that keeps all in the parameter's type, except for counts."""
    return {
        key: kept.to(parameter.dtype) if isinstance(kept, torch.Tensor) and _is_real(key, kept) else kept
        for key, kept in state.items()
    }


def nothing_is_kept(settings: Any) -> bool:
    """Of small steps of 16-bit weights, whatever the keys say; see `OptimizerKind.loses_small_steps`."""
    return True


def as_it_is(parameter: torch.Tensor, value: torch.Tensor, state: State) -> State:
    """State whose types do not depend on the parameter's."""
    return state


def _is_real(key: str, kept: torch.Tensor) -> bool:
    return kept.is_floating_point() and key not in ("step", "mu_product")
