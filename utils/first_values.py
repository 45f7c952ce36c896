"""First values of parameters, which classes draw when they are made: also where there is no memory for them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch.nn import init

DRAWN = tuple(name for name in vars(init) if name.endswith("_") and not name.startswith("_"))
"""The functions of `torch.nn.init` that give a tensor its values in place."""
_one_at_a_time = threading.RLock()


@contextmanager
def none_without_memory() -> Iterator[None]:
    """A context in which `torch.nn.init` leaves tensors on the meta device alone.

    They have no values that it could give them, and each operation on them is some of Python's functions: a tenth of
    the time in which a denoiser is made. All other tensors get their values as ever, in other threads too."""
    with _one_at_a_time:
        functions = {name: getattr(init, name) for name in DRAWN}
        for name, function in functions.items():
            setattr(init, name, _but_for_meta(function))
        try:
            yield
        finally:
            for name, function in functions.items():
                setattr(init, name, function)


def _but_for_meta(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def drawn(tensor: torch.Tensor, *arguments: Any, **named: Any) -> Any:
        return tensor if tensor.is_meta else function(tensor, *arguments, **named)

    return drawn
