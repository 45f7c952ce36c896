"""Computations on the meta device that look at whole numbers: at the ids of tokens, the sizes of pictures, at masks."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map

aten = torch.ops.aten
META = torch.device("meta")
INDEXING = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default)
"""Operations whose second argument is a list of indices, of which masks take as many places as they have ones."""


class RealIntegers(TorchDispatchMode):
    """Within this context tensors of whole numbers and masks have values, on the CPU, also where they are asked for on
    the meta device, and take part in what is computed there. Others that are on the meta device stay there."""

    def __torch_dispatch__(self, operation: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        on_meta = {one.is_meta for one in tree_iter((args, kwargs)) if isinstance(one, torch.Tensor)}
        if True in on_meta:
            return self._with_meta(operation, args, kwargs, mixed=False in on_meta)
        if torch.device(kwargs.get("device") or "cpu") != META:
            return operation(*args, **kwargs)
        made = operation(*args, **kwargs)
        # A type that is not named follows from the numbers.
        return made if _has_fractions(made) else operation(*args, **{**kwargs, "device": torch.device("cpu")})

    @staticmethod
    def _with_meta(operation: Any, args: tuple, kwargs: dict[str, Any], *, mixed: bool) -> Any:
        if mixed and operation in INDEXING:
            tensor, indices, *others = args
            args = tensor, [place for index in indices for place in _places(index)], *others
        if mixed:
            args, kwargs = tree_map(_without_values, (args, kwargs))
        if "device" in kwargs:
            kwargs = {**kwargs, "device": META}
        return operation(*args, **kwargs)


def _has_fractions(tensor: Any) -> bool:
    return not isinstance(tensor, torch.Tensor) or tensor.is_floating_point() or tensor.is_complex()


def _places(index: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """The indices for which an index stands, which may be a mask."""
    is_mask = index is not None and index.dtype == torch.bool and not index.is_meta
    return index.nonzero(as_tuple=True) if is_mask else (index,)


def _without_values(value: Any) -> Any:
    """A tensor of the same form on the meta device."""
    if not isinstance(value, torch.Tensor) or value.is_meta:
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=META)
