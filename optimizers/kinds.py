"""What the rest of the house asks of an optimizer. A file of this folder declares some as its `KINDS`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from utils.settings.choices import type_of
from utils.settings.schema import OptimizerSettings

Groups = list[dict[str, Any]]


@dataclass(frozen=True)
class OptimizerKind:
    """One `[optimizer] type`.

    Attributes:
        settings: the class of its keys, whose `type` is a Literal of one name.
        build: parameter groups, and its keys but `type` by name -> the optimizer. A third party's library is imported
            here and not before.
        state_bytes: keys, parameter -> bytes of the state that it keeps of the parameter beside it, once it has taken a
            step. What is kept once for all parameters, and counts of steps, which are in the machine's memory, are
            left out.
        not_on: type of device ("cpu", "cuda") on which it does not run -> why, and what to do.
    """

    settings: type[OptimizerSettings]
    build: Callable[..., torch.optim.Optimizer]
    state_bytes: Callable[[Any, torch.Tensor], int]
    not_on: Mapping[str, str]

    @property
    def type(self) -> str:
        """The name that chooses it."""
        name = type_of(self.settings)
        assert name, f"`type` of {self.settings.__name__} is no Literal"
        return name
