"""The bytes of an item: a safetensors file, so that other programs can read an item that is cut out of a shard.

Layout: the header's length in 8 bytes, the header in JSON, the tensors at offsets from its end. This module writes and
reads the format itself, since the library copies every tensor twice and parses every header again, which would take
most of the time of a cache.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch

from utils.json_files import is_of, parsed_json

HEADER_LENGTH_BYTES = 8
ALIGNMENT = 8
HEADERS_KEPT = 4096
DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def encoded(tensors: Mapping[str, torch.Tensor]) -> list[bytes | np.ndarray]:
    """An item with these tensors, in pieces; the pieces of contiguous tensors on the CPU are views of them."""
    # Wide types come first, so that every tensor begins at a multiple of its element's size.
    ordered = sorted(tensors.items(), key=lambda pair: (-pair[1].element_size(), pair[0]))
    header: dict[str, Any] = {}
    contents: list[np.ndarray] = []
    start = 0
    for name, tensor in ordered:
        assert tensor.dtype in _NAMES, f"{name}: {tensor.dtype} cannot be stored"
        content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        end = start + content.nbytes
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        contents.append(content)
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return [len(text).to_bytes(HEADER_LENGTH_BYTES, "little") + text, *contents]


def decoded(item: np.ndarray) -> dict[str, torch.Tensor]:
    """The tensors of an item (bytes, one-dimensional), as views of it.

    Raises:
        ValueError: it is none.
    """
    content = HEADER_LENGTH_BYTES + int.from_bytes(item[:HEADER_LENGTH_BYTES].tobytes(), "little")
    tensors = {}
    for entry in _layout(item[HEADER_LENGTH_BYTES:content].tobytes()):
        if entry.count:
            flat = torch.frombuffer(item, dtype=entry.dtype, count=entry.count, offset=content + entry.start)
            tensors[entry.name] = flat.view(entry.shape)
        else:
            tensors[entry.name] = torch.empty(entry.shape, dtype=entry.dtype)
    return tensors


class _Entry(NamedTuple):
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    count: int


@lru_cache(HEADERS_KEPT)
def _layout(header: bytes) -> tuple[_Entry, ...]:
    """The content of a header; samples of one bucket have the same."""
    entries = []
    try:
        for name, told in parsed_json(header).items():
            dtype, (start, end), shape = DTYPES[told["dtype"]], told["data_offsets"], tuple(told["shape"])
            entry = _Entry(name, dtype, shape, start, (end - start) // dtype.itemsize)
            if not is_of([*shape, start], list[Annotated[int, 0]]) or math.prod(shape) * dtype.itemsize != end - start:
                raise ValueError(f"'{name}' is {told}")
            entries.append(entry)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"no header of an item ({error!r})") from error
    return tuple(entries)
