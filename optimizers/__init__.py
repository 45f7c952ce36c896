"""How weights move: the file of a family of optimizers declares them as its `KINDS`, one `[optimizer] type` each."""

from __future__ import annotations

import torch

from optimizers.kinds import Groups, OptimizerKind
from utils.declared import kinds_in
from utils.errors import UserError
from utils.settings.choices import Choice
from utils.settings.schema import OptimizerSettings

NOT_FAMILIES = ("ema", "kinds", "parameter_groups", "schedules")


def available() -> dict[str, OptimizerKind]:
    """All optimizers, by `type`."""
    return {kind.type: kind for kind in kinds_in(__name__, __path__, NOT_FAMILIES)}


def find(optimizer_type: str) -> OptimizerKind:
    """The optimizer of a type; upper and lower case are alike.

    Raises:
        ValueError: there is no such optimizer; names the existing ones.
    """
    kinds, name = available(), optimizer_type.lower()
    if name not in kinds:
        raise ValueError(f'no optimizer is called "{name}"; known: {", ".join(kinds)}')
    return kinds[name]


def choice() -> Choice:
    """The choice of `[optimizer] type`."""
    return Choice(lambda name: find(name).settings, {name: kind.settings for name, kind in available().items()})


def build(groups: Groups, settings: OptimizerSettings) -> torch.optim.Optimizer:
    """The optimizer that `settings` describe, over `groups` (see `parameter_groups.groups_of`).

    A group's own `weight_decay` and `lr` override those of `settings`.
    Raises UserError if the algorithm cannot run on this machine; see `check`.
    """
    check(settings, "cuda" if torch.cuda.is_available() else "cpu")
    kind = find(settings.type)
    assert isinstance(settings, kind.settings), type(settings)
    return kind.build(groups, **settings.arguments())


def check(settings: OptimizerSettings, device_type: str, reason: str = "") -> None:
    """Whether the algorithm can run on a device of this type ("cuda", "cpu").

    Args:
        reason: why it has to; begins the message.

    Raises:
        UserError: it cannot; says why, and what to do.
    """
    advice = find(settings.type).not_on.get(device_type)
    if advice:
        raise UserError.of(f'{reason}"{settings.type}" {advice}', where="[optimizer] type")


def state_bytes(settings: OptimizerSettings, parameter: torch.Tensor) -> int:
    """The bytes of optimizer state for a parameter; see `OptimizerKind`."""
    return find(settings.type).state_bytes(settings, parameter)
