"""What stages do not send one another: what each of them can make itself of the rest of a stream."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn


class Remaking(NamedTuple):
    """What each stage makes itself of a stream that arrives, so that it is not sent.

    Attributes:
        fields: names of fields without gradients.
        remake: their values by name, of a stream that has all others. It belongs to the entry, but asks for none of its
            parameters and buffers, which most stages do not have.
    """

    fields: tuple[str, ...] = ()
    remake: Callable[[Any], dict[str, Any]] = lambda stream: {}

    @classmethod
    def of(cls, entry: nn.Module) -> Remaking:
        """As the first layer of a model says it, by `remakes` and `remake`; nothing if it does not."""
        return cls(entry.remakes, entry.remake) if hasattr(entry, "remakes") else cls()


def leaving(stream: Any, entry: Remaking) -> Any:
    """A stream as it is sent to the next stage."""
    return stream._replace(**dict.fromkeys(entry.fields)) if entry.fields else stream


def arrived(stream: Any, entry: Remaking) -> Any:
    """A stream that the stage before has sent, with all of its fields."""
    if not entry.fields:
        return stream
    with torch.no_grad():
        return stream._replace(**entry.remake(stream))
