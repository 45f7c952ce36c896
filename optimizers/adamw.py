"""AdamW of torch, with a float32 master of every parameter that is kept in 16 bits, or with another way of rounding.

A step of 1e-5 on a weight of 1 is lost in bfloat16, whose next number is 0.8 % away: without a master most weights of a
full fine-tune never change. The step updates the master, and the parameter gets its rounded value (Micikevicius et al.
2018, "Mixed Precision Training", section 3.1). `rounding.py` has the other ways.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.optim.adamw import adamw

from optimizers.eight_bits import eight_bit_bytes, in_eight_bits
from optimizers.kinds import OptimizerKind, State
from optimizers.libraries import as_it_is, nothing_is_kept
from optimizers.rounding import COMPENSATION, DRAWS, MASTER, Rounding, is_short, round_into, values_to_step
from utils.parameter_lists import in_lists
from utils.settings.schema import OptimizerSettings
from utils.settings.values import Betas, Positive

PART_ELEMENTS = 2**26
"""Elements of 16-bit parameters that are updated together: 256 MB of float32 gradients."""


class HalfLifeSettings(OptimizerSettings):
    """A key of optimizers that take it."""

    beta2_half_life: Positive | None = None
    """In place of the second of `betas`: after so many samples an old square counts half in the running mean, however
    many samples a step has (0.5^(samples of a step / half life))."""


class AdamWSettings(HalfLifeSettings):
    """`type = "adamw"`: AdamW, with a float32 master of each parameter that is kept in 16 bits."""

    type: Literal["adamw"]
    """Algorithm; upper and lower case are alike."""
    betas: Betas = (0.9, 0.999)
    """Decay rates of the two running means, of the gradient and of its square."""
    eps: Positive = 1e-8
    """Added to the denominator of the update."""
    rounding: Rounding = "master"
    """What keeps small steps of a bfloat16 weight: a float32 "master" of it; "kahan": 16 further bits; "stochastic":
    rounding up or down by chance, which takes no memory; with "nearest" they are lost."""


class AdamW8bitSettings(OptimizerSettings):
    """`type = "adamw8bit"`: AdamW with its state in 8 bits, of bitsandbytes. Needs a GPU."""

    type: Literal["adamw8bit"]
    """Algorithm; upper and lower case are alike."""
    betas: Betas = (0.9, 0.999)
    """Decay rates of the two running means, of the gradient and of its square."""
    eps: Positive = 1e-8
    """Added to the denominator of the update."""


class PagedAdamW8bitSettings(AdamW8bitSettings):
    """`type = "paged_adamw8bit"`: as "adamw8bit"; state that the GPU has no room for moves to the machine's memory."""

    type: Literal["paged_adamw8bit"]
    """Algorithm; upper and lower case are alike."""


class AdamW(torch.optim.Optimizer):
    """As `torch.optim.AdamW`; the state of a 16-bit parameter has its `master` beside the moments, all in float32.

    Args:
        params: parameters, or groups of them.
        lr, betas, eps, weight_decay: as torch's.
        rounding: what 16-bit parameters have in place of a master; see `AdamWSettings`.

    Attributes:
        found_inf: with a 1 in it, a step changes nothing; see torch's GradScaler.
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        rounding: Rounding = "master",
    ) -> None:
        self._rounding = rounding
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self._step_supports_amp_scaling = True
        self.found_inf: torch.Tensor | None = None

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        for group in self.param_groups:
            moved = [parameter for parameter in group["params"] if parameter.grad is not None]
            keys = group.get("names", range(len(group["params"])))
            names = dict(zip(map(id, group["params"]), keys, strict=True))
            # Those of swapped blocks are in the host's memory.
            for device in dict.fromkeys(parameter.device for parameter in moved):
                self._step_together([parameter for parameter in moved if parameter.device == device], group, names)

    def _step_together(
        self, parameters: list[nn.Parameter], group: dict[str, Any], names: Mapping[int, object]
    ) -> None:
        self._update([parameter for parameter in parameters if not is_short(parameter)], group)
        # Some at a time, since float32 gradients of all parameters would take as much memory as the masters.
        for some in in_parts(filter(is_short, parameters)):
            values = self._update(some, group)
            states = [self.state[parameter] for parameter in some]
            round_into(some, values, states, [names[id(parameter)] for parameter in some], self._rounding)

    def _update(self, parameters: list[nn.Parameter], group: dict[str, Any]) -> list[torch.Tensor]:
        """Steps the parameters, or float32 values of 16-bit ones, which are returned."""
        if not parameters:
            return []
        states = [self._state_of(parameter) for parameter in parameters]
        targets = [
            values_to_step(parameter, state, self._rounding) if is_short(parameter) else parameter
            for state, parameter in zip(states, parameters, strict=True)
        ]
        gradients = [parameter.grad.to(target.dtype) for parameter, target in zip(parameters, targets, strict=True)]
        first, second = group["betas"]
        # One kernel for all tensors on a GPU, and for all operations on a CPU, where it takes a sixth of the time. It
        # takes elements in the order in which they lie, and wants the counters beside them; a checkpoint brings these
        # on the CPU, where the other kernels want them.
        fused = all(
            target.stride() == gradient.stride() == state["exp_avg"].stride()
            for target, gradient, state in zip(targets, gradients, states, strict=True)
        )
        # It comes from the device, and who steps parameters in the host's memory has to wait for it: torch's own copy
        # does not, and would be read before it is there.
        found_inf = None if self.found_inf is None else self.found_inf.to(targets[0].device)
        if not fused and found_inf is not None and found_inf.item():
            return targets
        for state, target in zip(states, targets, strict=True):
            state["step"] = state["step"].to(target.device) if fused else state["step"].cpu()
        adamw(
            targets,
            gradients,
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            amsgrad=False,
            beta1=first,
            beta2=second,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
            fused=fused,
            found_inf=found_inf if fused else None,
        )
        return targets

    def _state_of(self, parameter: nn.Parameter) -> dict[str, torch.Tensor]:
        state = self.state[parameter]
        if not state:
            dtype = torch.float32 if is_short(parameter) else parameter.dtype
            state["step"] = torch.zeros((), device=parameter.device)
            for moment in ("exp_avg", "exp_avg_sq"):
                state[moment] = torch.zeros_like(parameter, dtype=dtype, memory_format=torch.preserve_format)
        return state


def in_parts(parameters: Iterable[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """The parameters that are updated together."""
    return in_lists(parameters, PART_ELEMENTS)


def with_master(parameter: torch.Tensor, value: torch.Tensor, state: State) -> State:
    """The moments are float32 in any type; a 16-bit parameter has a master beside them, and no other has one."""
    moments = {key: kept for key, kept in state.items() if key not in (MASTER, COMPENSATION, DRAWS)}
    return {**moments, MASTER: value.float()} if is_short(parameter) else moments


def _state_bytes(settings: AdamWSettings, parameter: torch.Tensor) -> int:
    """Two moments, and what keeps the small steps of a 16-bit parameter."""
    further = {"master": torch.float32.itemsize, "kahan": parameter.itemsize}.get(settings.rounding, 0)
    moments = 2 * max(parameter.itemsize, torch.float32.itemsize)
    return parameter.numel() * (moments + (further if is_short(parameter) else 0))


KINDS = (
    # The keys of a settings class have the names of the arguments of its optimizer.
    OptimizerKind(
        AdamWSettings,
        AdamW,
        _state_bytes,
        not_on={},
        retyped=with_master,
        float32_gradients=True,
        loses_small_steps=lambda settings: settings.rounding == "nearest",
    ),
    *(
        OptimizerKind(
            settings,
            in_eight_bits(name),
            partial(eight_bit_bytes, 2),
            not_on={"cpu": 'runs on GPUs only; use "adamw"'},
            # Its state has 8 bits, or 32 where there are few elements, whatever the parameter's type.
            retyped=as_it_is,
            library="bitsandbytes",
            loses_small_steps=nothing_is_kept,
        )
        for settings, name in ((AdamW8bitSettings, "AdamW8bit"), (PagedAdamW8bitSettings, "PagedAdamW8bit"))
    ),
)
