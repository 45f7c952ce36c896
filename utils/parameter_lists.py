"""Parameters that are worked on together: so many that a call has enough to do, and takes little memory at once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import nn


def in_lists(parameters: Iterable[nn.Parameter], elements: int) -> Iterator[list[nn.Parameter]]:
    """The parameters in their order, in lists of at most so many elements, or of one parameter that has more."""
    some: list[nn.Parameter] = []
    held = 0
    for parameter in parameters:
        if some and held + parameter.numel() > elements:
            yield some
            some, held = [], 0
        some.append(parameter)
        held += parameter.numel()
    if some:
        yield some
