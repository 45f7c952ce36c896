"""Writes safetensors files that are on disk when the call returns, and the same bytes for the same content.

The library's own writer puts metadata in an order of chance, makes files that only their owner can read, refuses
tensors that share memory, and has errors that are no OSError. The format: the length of the header in 8 bytes, the
header in JSON, the tensors one behind the other.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from utils.run.checksums import PIECE, Summing, Sums

ALIGNMENT = 8
NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class Deferred:
    """A tensor that is made when it is written, so that one after the other is in memory.

    Attributes:
        shape, dtype: those that it will have.
        make: makes it; called more than once if a hash is asked for too.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], torch.Tensor]

    def element_size(self) -> int:
        """Bytes of one number."""
        return self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of all."""
        return math.prod(self.shape) * self.dtype.itemsize

    def detach(self) -> torch.Tensor:
        """The tensor."""
        made = self.make()
        assert (tuple(made.shape), made.dtype) == (tuple(self.shape), self.dtype)
        return made


def write_tensors(
    path: Path, tensors: Mapping[str, torch.Tensor | Deferred], metadata: Mapping[str, str] | None = None
) -> Sums:
    """Writes a file. Returns its checksums.

    Raises:
        OSError: it cannot be written; names the file.
    """
    summing = Summing()
    try:
        with path.open("wb") as file:
            for content in _contents(tensors, metadata):
                for start in range(0, len(content), PIECE):
                    part = content[start : start + PIECE]
                    file.write(part)
                    summing.add(part)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        error.filename = error.filename or str(path)
        raise
    return summing.sums()


def _contents(
    tensors: Mapping[str, torch.Tensor | Deferred], metadata: Mapping[str, str] | None
) -> Iterator[memoryview]:
    # Larger numbers first, so that each tensor begins at a multiple of its numbers' size.
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    end = 0
    for name in order:
        begin, end = end, end + tensors[name].nbytes
        header[name] = {
            "dtype": NAMES[tensors[name].dtype],
            "shape": list(tensors[name].shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    yield memoryview(len(text).to_bytes(8, "little") + text)
    for name in order:
        flat = tensors[name].detach().cpu().contiguous()
        # One of a single element may have any stride.
        flat = flat.as_strided((flat.numel(),), (1,))
        yield memoryview(flat.view(torch.uint8).numpy())


def sha256_of(tensors: Mapping[str, torch.Tensor | Deferred]) -> str:
    """The SHA-256 of what `write_tensors` writes behind the header, in hexadecimal digits."""
    digest = hashlib.sha256()
    contents = _contents(tensors, None)
    next(contents)
    for content in contents:
        digest.update(content)
    return digest.hexdigest()
