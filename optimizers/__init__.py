"""How weights move: one table of algorithms, each made from the settings of its `type`."""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from optimizers.adamw import AdamW
from utils.errors import UserError
from utils.settings.schema import OptimizerSettings

Groups = list[dict[str, Any]]


def build(groups: Groups, settings: OptimizerSettings) -> torch.optim.Optimizer:
    """The optimizer that `settings` describe, over `groups` (see `parameter_groups.groups_of`).

    A group's own `weight_decay` and `lr` count before those of `settings`.
    Raises UserError if the algorithm cannot run on this machine; see `check`.
    """
    check(settings, "cuda" if torch.cuda.is_available() else "cpu")
    # The keys of a settings class are named as the arguments of its optimizer.
    return _BUILDERS[settings.type](groups, **settings.model_dump(exclude={"type"}))


def check(settings: OptimizerSettings, device_type: str) -> None:
    """Whether the algorithm can run on a device of this type ("cuda", "cpu").

    Raises:
        UserError: it cannot.
    """
    if settings.type == "adamw8bit" and device_type != "cuda":
        raise UserError.of('"adamw8bit" needs a GPU, and there is none; use "adamw"', where="[optimizer] type")


def _adamw8bit(groups: Groups, **keys: Any) -> torch.optim.Optimizer:
    # Its import looks for CUDA libraries and takes seconds.
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(groups, **keys)


_BUILDERS: Mapping[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": AdamW,
    "adamw8bit": _adamw8bit,
    "sgd": torch.optim.SGD,
}
