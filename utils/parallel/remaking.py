"""What stages do not send one another: what each of them can make itself of the rest of a stream."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from utils.parallel.wire import flatten


class Remaking(NamedTuple):
    """What each stage makes itself of a stream that arrives, so that it is not sent.

    Attributes:
        fields: names of fields. One that has a gradient is sent all the same, since that has to come back.
        remake: their values by name, of a stream that has all others. It belongs to the entry, but asks for none of its
            parameters, which most stages do not have; buffers are where the entry was built, on the CPU.
    """

    fields: tuple[str, ...] = ()
    remake: Callable[[Any], dict[str, Any]] = lambda stream: {}

    @classmethod
    def of(cls, entry: nn.Module) -> Remaking:
        """As the first layer of a model says it, by `remakes` and `remake`; nothing if it does not."""
        return cls(entry.remakes, entry.remake) if hasattr(entry, "remakes") else cls()


def leaving(stream: Any, entry: Remaking) -> Any:
    """A stream as it is sent to the next stage."""
    left_out = [name for name in entry.fields if not _has_gradient(getattr(stream, name))]
    return stream._replace(**dict.fromkeys(left_out)) if left_out else stream


def arrived(stream: Any, entry: Remaking) -> Any:
    """A stream that the stage before has sent, with all of its fields."""
    missing = [name for name in entry.fields if getattr(stream, name) is None]
    if not missing:
        return stream
    with torch.no_grad():
        made = entry.remake(stream)
    return stream._replace(**{name: made[name] for name in missing})


def _has_gradient(field: Any) -> bool:
    tensors, _ = flatten((field,))
    return any(tensor.requires_grad for tensor in tensors)
