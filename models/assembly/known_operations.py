"""Operations on the meta device, of which torch works out each kind once.

There torch finds the form of a result in Python, for a normalisation by way of dozens of other operations, which takes
a millisecond. A model asks for few kinds of operations many times.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

NEW, ITSELF = "new", "itself"
"""What an operation makes: tensors of their own; or its first argument, with other values."""


class Form(NamedTuple):
    """What there is to know of a tensor on the meta device."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Form:
        return cls(tuple(tensor.shape), tensor.stride(), tensor.dtype)

    def empty(self) -> torch.Tensor:
        """A tensor of this form."""
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device="meta")


class Plain(NamedTuple):
    """An argument that is no tensor. 1, 1.0 and True are equal, and make results of other types."""

    kind: type
    value: Any


class KnownOperations(TorchDispatchMode):
    """Within this context an operation on the meta device makes what the first of its kind made: one with the same
    arguments, of tensors their forms. Views are always computed."""

    def __torch_dispatch__(self, operation: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        kind = _kind(operation)
        if kind is None:
            return operation(*args, **kwargs)
        try:
            forms = _made(operation, _form_of(args), _form_of(tuple(kwargs.items())))
        # Arguments without a form, or without a hash.
        except TypeError:
            forms = None
        if forms is None:
            return operation(*args, **kwargs)
        if kind == ITSELF:
            return args[0]
        made = [form.empty() for form in forms]
        return made[0] if len(made) == 1 else tuple(made)


@cache
def _kind(operation: Any) -> str | None:
    """What an operation makes, by its schema; None for all else."""
    schema = operation._schema
    if not schema.returns or any(str(one.type) != "Tensor" for one in schema.returns):
        return None
    changed = [one.alias_info is not None for one in schema.arguments]
    if not any(changed) and all(one.alias_info is None for one in schema.returns):
        return NEW
    in_place = schema.name.endswith("_") and schema.is_mutable and changed[0] and sum(changed) == 1
    return ITSELF if in_place else None


@cache
def _made(operation: Any, args: tuple, kwargs: tuple) -> tuple[Form, ...] | None:
    """The forms of what an operation makes of arguments of these forms; None if that is not what its schema says.

    Raises:
        TypeError: an argument has no hash.
    """
    given, named = _of_form(args), dict(_of_form(kwargs))
    tensors = [one for one in tree_iter((given, named)) if isinstance(one, torch.Tensor)]
    if not tensors:
        return None
    made = operation(*given, **named)
    made = (made,) if isinstance(made, torch.Tensor) else made
    # Backward passes leave out gradients that nobody asks for.
    if not all(isinstance(one, torch.Tensor) for one in made):
        return None
    forms = tuple(map(Form.of, made))
    if _kind(operation) == ITSELF:
        return forms if made[0] is given[0] and forms[0] == args[0] else None
    storages = [one.untyped_storage() for one in (*tensors, *made)]
    apart = len({storage._cdata for storage in storages}) == len(storages)
    whole = all(
        tensor.untyped_storage().nbytes() == form.empty().untyped_storage().nbytes()
        for tensor, form in zip(made, forms, strict=True)
    )
    return forms if apart and whole else None


def _form_of(value: Any) -> Any:
    """The same for arguments with which an operation makes the same.

    Raises:
        TypeError: a tensor has more to it than its form.
    """
    if isinstance(value, torch.Tensor):
        if not value.is_meta or value.layout != torch.strided or value.is_complex():
            raise TypeError(f"{value.device}, {value.layout}, {value.dtype}")
        return Form.of(value)
    if isinstance(value, list | tuple):
        return tuple(map(_form_of, value))
    return Plain(type(value), value)


def _of_form(form: Any) -> Any:
    """An argument of this form."""
    if isinstance(form, Form):
        return form.empty()
    return form.value if isinstance(form, Plain) else list(map(_of_form, form))
