"""Named parameters -> the groups that an optimizer takes."""

from collections.abc import Iterable
from typing import Any

from torch import nn


def groups_of(
    named_parameters: Iterable[tuple[str, nn.Parameter]], *, lr: float, weight_decay: float
) -> list[dict[str, Any]]:
    """The trainable ones of `named_parameters`, in groups of `params`, `names`, `lr` and `weight_decay`.

    Vectors and scalars (norm scales, biases) are not decayed: decay would pull a norm's scale from 1 to 0
    and limits no growth that a bias could have. With `weight_decay` 0 there is one group.
    """
    trainable = [(name, parameter) for name, parameter in named_parameters if parameter.requires_grad]
    decayed = [entry for entry in trainable if entry[1].ndim > 1 and weight_decay > 0]
    kept = [entry for entry in trainable if entry[1].ndim <= 1 or weight_decay == 0]
    return [
        {
            "params": [parameter for _, parameter in entries],
            "names": [name for name, _ in entries],
            "lr": lr,
            "weight_decay": decay,
        }
        for entries, decay in ((decayed, weight_decay), (kept, 0.0))
        if entries
    ]
