"""Weights on disk -> the parameters that this process holds.

A denoiser is built from its configuration on the meta device, where it costs no memory, cut into layers, and only then
are the tensors of this process's stage read: by memory map, each in the type it is kept in.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from torch import nn

from models.foundation.key_layouts import KeyLayout, Piece, swap_halves
from utils.settings.errors import SettingsError

FINGERPRINT_BLOCKS = 64
FINGERPRINT_BLOCK_BYTES = 64 * 1024


@dataclass(frozen=True)
class Header:
    """What a safetensors file (or the shards of one) holds: where each tensor is, and its shape."""

    files: dict[str, Path]
    shapes: dict[str, tuple[int, ...]]

    @property
    def paths(self) -> list[Path]:
        return sorted(set(self.files.values()))


def read_header(path: Path) -> Header:
    """The header of a safetensors file, or of all those in a folder.

    Raises:
        SettingsError: there is no such file, or it is not a safetensors file.
    """
    paths = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    if not paths:
        raise SettingsError.of("no safetensors file here; give a .safetensors file or a folder with some", str(path))
    files, shapes = {}, {}
    for file in paths:
        try:
            with safe_open(file, framework="pt") as opened:
                for key in opened.keys():
                    files[key] = file
                    shapes[key] = tuple(opened.get_slice(key).get_shape())
        except (SafetensorError, OSError) as error:
            raise SettingsError.of(f"not a whole safetensors file ({error}); download it again", str(file)) from error
    return Header(files, shapes)


class Weights:
    """The tensors of a model by our names, read when asked for.

    Args:
        path: a .safetensors file, or a folder with one or its shards.
        module: the model (on the meta device will do), for names and shapes.
        layout: the table by which another program names them; None if the files use our names.
    """

    def __init__(self, path: Path, module: nn.Module, layout: KeyLayout | None = None):
        self.path = path
        header = read_header(path)
        shapes = {name: tuple(parameter.shape) for name, parameter in module.state_dict().items()}
        try:
            self.pieces = layout.pieces(shapes, header.files) if layout else {name: Piece(name) for name in shapes}
        except ValueError as error:
            raise SettingsError.of(f"{error}: this file does not fit the model's configuration", str(path)) from error
        self.header = header
        self._check(shapes)
        self._opened: dict[Path, Any] = {}

    def _check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        for name, shape in shapes.items():
            piece = self.pieces.get(name)
            if piece is None or piece.key not in self.header.files:
                raise SettingsError.of(f"the tensor '{name}' of the model is not in the file; is it another model's?",
                                       str(self.path))  # fmt: skip
            stored = self.header.shapes[piece.key]
            if piece.rows is None and stored != shape:
                raise SettingsError.of(
                    f"'{piece.key}' is {list(stored)}, but the model's configuration asks for {list(shape)}; "
                    "is it another model's?", str(self.path))  # fmt: skip

    def read(self, name: str) -> torch.Tensor:
        """One tensor, on the CPU, in the type of the file."""
        piece = self.pieces[name]
        file = self.header.files[piece.key]
        if file not in self._opened:
            self._opened[file] = safe_open(file, framework="pt")
        stored = self._opened[file].get_slice(piece.key)
        tensor = stored[piece.rows[0] : piece.rows[1]] if piece.rows else stored[...]
        return swap_halves(tensor) if piece.swap_halves else tensor


def build_empty(factory: Callable[[], nn.Module]) -> nn.Module:
    """A module whose parameters are on the meta device; buffers and plain attributes are real, since their values are
    computed when it is built and lie in no file."""
    with init_empty_weights(include_buffers=False):
        return factory()


def materialise(
    module: nn.Module, names: Iterable[str], read: Callable[[str], torch.Tensor], dtype_of: Callable[[str], torch.dtype]
) -> None:
    """Gives real values to the meta parameters `names` of a module.

    The parameters keep their identity, so that layers which already hold them hold the values too.
    """
    parameters = dict(module.named_parameters())
    for name in names:
        empty = parameters[name]
        if empty.is_meta:
            values = read(name).to(dtype_of(name))
            real = nn.Parameter(values.clone() if values.data_ptr() % 16 else values, requires_grad=empty.requires_grad)
            torch.utils.swap_tensors(empty, real)


def fingerprint(*parts: Path | str | Mapping[str, Any]) -> str:
    """What a cached item was made with: settings as they are, files by their size and 64 evenly spaced blocks.

    Another training of the same model differs in every block, so that reading four megabytes tells two files apart
    where reading them whole would take a minute.
    """
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        if isinstance(part, Path):
            for file in [part] if part.is_file() else sorted(p for p in part.iterdir() if p.is_file()):
                _digest_file(digest, file)
        else:
            digest.update(json.dumps(part, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def _digest_file(digest: Any, file: Path) -> None:
    size = file.stat().st_size
    digest.update(f"{file.name}:{size}".encode())
    step = max(FINGERPRINT_BLOCK_BYTES, size // FINGERPRINT_BLOCKS)
    with file.open("rb") as opened:
        for offset in range(0, size, step):
            opened.seek(offset)
            digest.update(opened.read(FINGERPRINT_BLOCK_BYTES))
