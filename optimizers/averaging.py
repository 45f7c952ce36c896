"""Optimizers that keep an average of what they train, which is what is to be used (schedule-free ones, Defazio et al.
2024, "The Road Less Scheduled").

Their parameters are, in training, a point between the average and the newest iterate. `eval()` gives them the average,
`train()` the point again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn


def has_averages(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the weights that are to be used are others than those that are trained."""
    return callable(getattr(optimizer, "eval", None)) and callable(getattr(optimizer, "train", None))


def begin_training(optimizer: torch.optim.Optimizer) -> None:
    """Lets an optimizer begin in the state in which it takes steps."""
    if has_averages(optimizer):
        optimizer.train()


@contextmanager
def weights_to_use(
    optimizer: torch.optim.Optimizer,
    parameters: Iterable[nn.Parameter] = (),
    given: Callable[[], None] = lambda: None,
) -> Iterator[None]:
    """A context in which the parameters have the values that are to be used, for evaluation, sampling and export. No
    step may be taken and no checkpoint may be written within it.

    Args:
        parameters: further ones, to which `given` brings the values of those that the optimizer has.
        given: see there; all processes call it together.
    """
    if not has_averages(optimizer):
        yield
        return
    stepped = (parameter for group in optimizer.param_groups for parameter in group["params"])
    changed = list({id(parameter): parameter for parameter in (*stepped, *parameters)}.values())
    # Going there and back rounds twice: what is trained would depend on how often it is looked at.
    kept = [parameter.detach().clone() for parameter in changed]
    optimizer.eval()
    try:
        given()
        yield
    finally:
        optimizer.train()
        with torch.no_grad():
            for parameter, value in zip(changed, kept, strict=True):
                parameter.copy_(value)
