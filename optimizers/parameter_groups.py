"""Named parameters -> parameter groups for an optimizer."""

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn


def groups_of(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    *,
    lr: float,
    weight_decay: float,
    own_lr: Callable[[str], float | None] = lambda name: None,
    own_decay: Callable[[str], float | None] = lambda name: None,
) -> list[dict[str, Any]]:
    """The trainable parameters of `named_parameters`, in groups with `params`, `names`, `lr`, `initial_lr` and
    `weight_decay`; schedules multiply `initial_lr`.

    Vectors and scalars (norm scales, biases) are not decayed: decay would pull a norm's scale from 1 to 0
    and limits no growth that a bias could have. With `weight_decay` 0 all are together.

    Args:
        own_lr: name -> the learning rate of a parameter that has its own.
        own_decay: name -> the weight decay of a parameter that has its own.
    """
    groups: dict[tuple[float, float], list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in named_parameters:
        if parameter.requires_grad:
            rate, decay = own_lr(name), own_decay(name)
            of_all = weight_decay if parameter.ndim > 1 else 0.0
            key = lr if rate is None else rate, of_all if decay is None else decay
            groups.setdefault(key, []).append((name, parameter))
    return [
        {
            "params": [parameter for _, parameter in entries],
            "names": [name for name, _ in entries],
            "lr": group_lr,
            "initial_lr": group_lr,
            "weight_decay": decay,
        }
        # Groups with weight decay first.
        for (group_lr, decay), entries in sorted(groups.items(), key=lambda group: group[0], reverse=True)
    ]
