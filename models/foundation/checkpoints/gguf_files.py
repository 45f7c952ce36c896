"""GGUF files: the container of llama.cpp, in which ComfyUI-GGUF has quantised denoisers under their publishers' names.
llama.cpp itself renames the tensors of a T5.

Read by the package `gguf` of the same authors. A tensor is decoded when it is asked for, and then has the form of any
other: in which one it is kept in memory is another question.
"""

from __future__ import annotations

import re
from pathlib import Path
from types import EllipsisType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from utils.errors import UserError

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType
    from gguf.gguf_reader import ReaderTensor

MAGIC = b"GGUF"
SHAPE = "comfy.gguf.orig_shape."
"""What the names of fields begin with that give a tensor's own shape, where blocks of numbers did not fit into its rows
and it is stored in others."""
OTHERS = "give one of another kind, such as Q8_0, Q6_K, Q5_K_M, Q4_K_S or Q4_0"
PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Kinds that are no codes: their numbers are taken as they are."""

T5_NAMES = {"token_embd": "shared", "enc.output_norm": "encoder.final_layer_norm"}
T5_BLOCK = {
    "attn_norm": "layer.0.layer_norm",
    **{f"attn_{part}": f"layer.0.SelfAttention.{part}" for part in "qkvo"},
    "attn_rel_b": "layer.0.SelfAttention.relative_attention_bias",
    "ffn_norm": "layer.1.layer_norm",
    "ffn_gate": "layer.1.DenseReluDense.wi_0",
    "ffn_up": "layer.1.DenseReluDense.wi_1",
    "ffn_down": "layer.1.DenseReluDense.wo",
}
"""llama.cpp's names of the modules of a gated T5 and of one of its blocks, and those of transformers."""


def is_gguf(path: Path) -> bool:
    """Whether a file says of itself that it is one."""
    with path.open("rb") as opened:
        return opened.read(len(MAGIC)) == MAGIC


class GgufTensor:
    """One tensor, which `[...]` decodes: in its own type if it is stored in floating-point numbers of 16 or 32 bits,
    otherwise in float32.

    Attributes:
        shape: its shape, as torch has it.
    """

    def __init__(self, stored: ReaderTensor, own_shape: tuple[int, ...] | None):
        self.stored, self.kind = stored, stored.tensor_type
        rows = tuple(int(size) for size in reversed(stored.shape))
        self.shape = own_shape or rows
        # A row of codes is decoded alone, if rows are those of the tensor.
        self.decodes_rows = self.shape == rows and len(rows) > 1

    def __getitem__(self, index: EllipsisType | slice) -> torch.Tensor:
        """All of it, or some of its rows."""
        if self.decodes_rows:
            return _decoded(self.stored.data[index], self.kind)
        return _decoded(self.stored.data, self.kind).reshape(self.shape)[index]


def _decoded(data: np.ndarray, kind: GGMLQuantizationType) -> torch.Tensor:
    from gguf.quants import dequantize

    # The file is mapped, and read only; torch wants memory that can be written.
    if kind.name in PLAIN:
        return torch.from_numpy(np.array(data)).view(PLAIN[kind.name])
    return torch.from_numpy(dequantize(np.array(data), kind))


class GgufFile:
    """The tensors of a GGUF file.

    Attributes:
        tensors: by name.
        architecture: what the file says that it is of, as "flux"; "" if it says nothing.

    Raises:
        UserError: it is no whole GGUF file, one of several, or holds a kind of codes that is not known.
    """

    def __init__(self, path: Path):
        reader = _reader(path)
        if _field(reader, "split.count", 1) > 1:
            raise UserError.of("is one part of a GGUF in several files; give a whole one", str(path))
        self.architecture = str(_field(reader, "general.architecture", ""))
        own_shapes = {
            name.removeprefix(SHAPE): tuple(field.contents())
            for name, field in reader.fields.items()
            if name.startswith(SHAPE)
        }
        self.tensors = {one.name: GgufTensor(one, own_shapes.get(one.name)) for one in reader.tensors}
        for name, tensor in self.tensors.items():
            if not tensor.stored.n_elements or np.prod(tensor.shape) != tensor.stored.n_elements:
                raise UserError.of(
                    f"'{name}' has {tensor.stored.n_elements} numbers, and {list(tensor.shape)} is given as its shape; "
                    "download it again",
                    str(path),
                )
        _check_kinds(path, self.tensors)

    def get_slice(self, key: str) -> GgufTensor:
        """A tensor, of which `[...]` reads some rows or all: the method of an opened safetensors file."""
        return self.tensors[key]


def _reader(path: Path) -> Any:
    from gguf.gguf_reader import GGUFReader

    try:
        return GGUFReader(path)
    # Of a file that ends too soon, or is of a later version, the package tells whatever error it meets.
    except (ValueError, IndexError, KeyError, TypeError, OSError, UnicodeDecodeError) as error:
        raise UserError.of(
            f"cannot be read ({error}): it is not whole, or of a kind not known here; download it again, or {OTHERS}",
            str(path),
        ) from error


def _field(reader: Any, name: str, default: Any) -> Any:
    field = reader.get_field(name)
    return default if field is None else field.contents()


def _check_kinds(path: Path, tensors: dict[str, GgufTensor]) -> None:
    """Whether the package can decode all that there is."""
    from gguf.constants import GGML_QUANT_SIZES
    from gguf.quants import dequantize

    for kind in {tensor.kind for tensor in tensors.values()}:
        _, size = GGML_QUANT_SIZES[kind]
        try:
            if kind.name not in PLAIN:
                dequantize(np.zeros((1, size), np.uint8), kind)
        except NotImplementedError as error:
            name = next(name for name, tensor in tensors.items() if tensor.kind == kind)
            raise UserError.of(
                f"'{name}' is of the kind {kind.name}, which cannot be decoded; {OTHERS}", str(path)
            ) from error


def t5_tensors(path: Path) -> dict[str, GgufTensor]:
    """The tensors of a GGUF file of T5 or UMT5 under the names of transformers.

    Raises:
        UserError: it cannot be read, or is of something else.
    """
    file = GgufFile(path)
    named = {_t5_name(name): tensor for name, tensor in file.tensors.items()}
    if None in named or not named:
        other = next((name for name in file.tensors if _t5_name(name) is None), "")
        raise UserError.of(
            f"is a GGUF file of '{file.architecture}', and '{other}' is no tensor of T5 or UMT5, the only "
            "text encoders that are read from one; give a safetensors file",
            str(path),
        )
    return named


def _t5_name(name: str) -> str | None:
    """transformers' name of one of llama.cpp's; None if T5 has no such tensor."""
    module, _, own = name.rpartition(".")
    if module in T5_NAMES:
        return f"{T5_NAMES[module]}.{own}"
    block = re.fullmatch(r"enc\.blk\.(\d+)\.(\w+)", module)
    return f"encoder.block.{block[1]}.{T5_BLOCK[block[2]]}.{own}" if block and block[2] in T5_BLOCK else None
