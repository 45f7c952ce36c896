"""Sends streams across stage boundaries.

A stream is a NamedTuple whose fields are tensors, tuples of tensors, or None. Before it crosses, it is flattened into
its tensors and a description (which field holds what; type, shape and "requires grad" of every tensor). The
description travels first, as one small integer tensor through a CPU group, so that neither side waits for its GPU;
then the tensors. A gradient comes back for exactly those tensors that required one on the sender's side: rotary
tables, masks, text features and the time embedding of a frozen embedder cost no gradient. Tensors without elements,
which carry a length in their shape, are described and not sent. One that is in several places, as a UNet's newest skip,
crosses once, and its gradient comes back once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

DESCRIPTION_NUMBERS = 1024
# Types that NCCL can send; it has no int16.
DTYPES = (
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.complex64,
    torch.complex128,
    torch.uint8,
    torch.int8,
    torch.int32,
    torch.int64,
    torch.bool,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
)
DTYPE_CODES = {dtype: code for code, dtype in enumerate(DTYPES)}
NOTHING, SINGLE = -1, -2


@dataclass(frozen=True)
class TensorDescription:
    dtype: torch.dtype
    shape: tuple[int, ...]
    requires_grad: bool


@dataclass(frozen=True)
class Description:
    """The layout of a stream.

    Attributes:
        fields: for each NOTHING, SINGLE or the length of a tuple.
        places: for each place of a tensor in the fields, in order, which of the tensors it has.
        tensors: each once.
    """

    fields: tuple[int, ...]
    places: tuple[int, ...]
    tensors: tuple[TensorDescription, ...]


def flatten(stream: Sequence[Any]) -> tuple[list[torch.Tensor], Description]:
    """The tensors of a stream in order, each once, and the description that `unflatten` needs.

    Raises:
        TypeError: a field is neither a tensor, a tuple of tensors, nor None.
    """
    tensors: list[torch.Tensor] = []
    fields: list[int] = []
    for position, field in enumerate(stream):
        if field is None:
            fields.append(NOTHING)
        elif isinstance(field, torch.Tensor):
            fields.append(SINGLE)
            tensors.append(field)
        elif isinstance(field, tuple) and all(isinstance(part, torch.Tensor) for part in field):
            fields.append(len(field))
            tensors.extend(field)
        else:
            raise TypeError(f"field {position} of the stream is a {type(field).__name__}, which cannot cross stages")
    unique = list({id(tensor): tensor for tensor in tensors}.values())
    numbers = {id(tensor): number for number, tensor in enumerate(unique)}
    described = tuple(TensorDescription(t.dtype, tuple(t.shape), t.requires_grad) for t in unique)
    return unique, Description(tuple(fields), tuple(numbers[id(tensor)] for tensor in tensors), described)


def map_tensors(function: Callable[[torch.Tensor], torch.Tensor], value: Any) -> Any:
    """A stream, or whatever is made of tuples, NamedTuples, tensors and None, with the function's results in the places
    of its tensors."""
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, tuple):
        mapped = [map_tensors(function, part) for part in value]
        return type(value)(*mapped) if hasattr(value, "_fields") else tuple(mapped)
    return value


def to_device(fields: Any, device: torch.device) -> Any:
    """The same with its tensors on `device`."""
    return map_tensors(lambda tensor: tensor.to(device, non_blocking=True), fields)


def unflatten(tensors: Sequence[torch.Tensor], description: Description) -> tuple[Any, ...]:
    """The fields of a stream that `flatten` took apart."""
    remaining = iter([tensors[number] for number in description.places])
    fields: list[Any] = []
    for count in description.fields:
        if count == NOTHING:
            fields.append(None)
        elif count == SINGLE:
            fields.append(next(remaining))
        else:
            fields.append(tuple(next(remaining) for _ in range(count)))
    return tuple(fields)


@lru_cache(maxsize=64)
def encode(description: Description) -> torch.Tensor:
    """The description as int64 numbers of fixed length on the CPU, which are only to be read: most micro-batches have
    the same."""
    numbers = [len(description.fields), *description.fields, len(description.places), *description.places]
    numbers.append(len(description.tensors))
    for tensor in description.tensors:
        numbers += [DTYPE_CODES[tensor.dtype], int(tensor.requires_grad), len(tensor.shape), *tensor.shape]
    assert len(numbers) <= DESCRIPTION_NUMBERS, (
        f"a stream of {len(description.tensors)} tensors is too long to describe"
    )
    return torch.tensor(numbers + [0] * (DESCRIPTION_NUMBERS - len(numbers)), dtype=torch.int64)


def decode(numbers: torch.Tensor) -> Description:
    """The inverse of `encode`."""
    remaining = iter(numbers.tolist())

    def take(count: int) -> tuple[int, ...]:
        return tuple(next(remaining) for _ in range(count))

    (field_count,) = take(1)
    fields = take(field_count)
    (place_count,) = take(1)
    places = take(place_count)
    (tensor_count,) = take(1)
    tensors = []
    for _ in range(tensor_count):
        code, requires_grad, dimensions = take(3)
        tensors.append(TensorDescription(DTYPES[code], take(dimensions), bool(requires_grad)))
    return Description(fields, places, tuple(tensors))
