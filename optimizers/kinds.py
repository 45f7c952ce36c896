"""The interface of an optimizer. A file in this folder declares its optimizers as `KINDS`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from utils.settings.choices import type_of
from utils.settings.schema import OptimizerSettings

Groups = list[dict[str, Any]]
State = dict[str, Any]
"""What an optimizer keeps for one parameter, by key."""


@dataclass(frozen=True)
class OptimizerKind:
    """One `[optimizer] type`.

    Attributes:
        settings: the class of its keys, whose `type` is a Literal of one name.
        build: (parameter groups, its keys except `type` by name) -> the optimizer. It imports third-party libraries.
        state_bytes: (keys, parameter) -> the bytes of the parameter's optimizer state after a step, without state for
            all parameters together and without step counters, which stay in the machine's memory.
        not_on: type of device ("cpu", "cuda") on which it does not run -> the reason, and what to do.
        retyped: (parameter, its value, its state) -> the state that it has in its type, where the state was made when
            it had another. The value is the most exact that is known, on the parameter's device.
        float32_gradients: whether it takes float32 gradients of 16-bit parameters, in which micro-batches are summed.
        library: who has it right, for the docs.
        averages: whether the weights to use are an average of those that it trains; see `optimizers/averaging.py`.
        constant_rate: why its learning rate must be constant after warm-up; "" where any schedule does.
        sums: whether a step depends on sums over all parameters; see `optimizers/sums.py`. Other optimizers step each
            parameter by itself.
        counts_steps: whether it counts steps for a whole group, whose parameters must be stepped together then.
        refuses: keys -> why they do not go together, with the key first; "" if they do.
        unknown: whether it is somebody's class of which no more is known than its signature.
        loses_small_steps: keys -> whether steps are lost for which a weight of 16 bits has no digits, since nothing is
            kept of them beside it.
    """

    settings: type[OptimizerSettings]
    build: Callable[..., torch.optim.Optimizer]
    state_bytes: Callable[[Any, torch.Tensor], int]
    not_on: Mapping[str, str]
    retyped: Callable[[torch.Tensor, torch.Tensor, State], State]
    float32_gradients: bool = False
    library: str = "ours"
    averages: bool = False
    constant_rate: str = ""
    sums: bool = False
    counts_steps: bool = False
    refuses: Callable[[Any], str] = lambda settings: ""
    unknown: bool = False
    loses_small_steps: Callable[[Any], bool] = lambda settings: False

    @property
    def steps_alone(self) -> bool:
        """Whether parameters may be stepped one after the other, each by itself."""
        return not (self.sums or self.averages or self.counts_steps or self.unknown)

    @property
    def type(self) -> str:
        """Its name in `[optimizer] type`."""
        name = type_of(self.settings)
        assert name, f"`type` of {self.settings.__name__} is no Literal"
        return name
