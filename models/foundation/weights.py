"""Weights on disk -> the parameters that this process holds.

A denoiser is built from its configuration on the meta device, where it costs no memory, cut into layers, and only then
are the tensors of this process's stage read: by memory map, each in the type it is kept in.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from torch import nn

from models.foundation.key_layouts import KeyLayout, Piece, swap_halves
from utils.settings.errors import SettingsError
from utils.settings.json_files import read_json

logger = logging.getLogger(__name__)

SCALE_NAMES = ("scale_weight", "weight_scale")
"""What programs call the number by which an 8-bit `weight` is to be multiplied."""
USUAL_NAMES = ("diffusion_pytorch_model.safetensors", "model.safetensors", "adapter_model.safetensors")
INDEX = ".index.json"
SUFFIXES = (".safetensors", ".sft")
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
    """The header of a safetensors file, or of those in a folder that belong together.

    Raises:
        SettingsError: there is no such file, or it is not a whole safetensors file.
    """
    paths = [path] if path.is_file() else _files_in(path)
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
            cure = "download it again" if file.suffix in SUFFIXES else "give one; other formats are not read"
            raise SettingsError.of(f"not a whole safetensors file ({error}); {cure}", str(file)) from error
    return Header(files, shapes)


def _files_in(folder: Path) -> list[Path]:
    """The files of a folder's weights: those with the usual name, as shards or as one (others are variants of it, as
    `.fp16`), else the shards of another name, else whatever there is."""
    for name in USUAL_NAMES:
        if (folder / f"{name}{INDEX}").is_file():
            return _shards(folder / f"{name}{INDEX}")
        if (folder / name).is_file():
            return [folder / name]
    variants = sorted(folder.glob(f"*.safetensors{INDEX}"))
    return _shards(variants[0]) if variants else sorted(folder.glob("*.safetensors"))


def _shards(index: Path) -> list[Path]:
    """The files that an index names."""
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise SettingsError.of("has no table `weight_map` of file names; download it again", str(index))
    return sorted({index.parent / name for name in places.values()})


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
        self._check(shapes, layout.prefix(header.files) if layout else "", layout.unused if layout else ())
        self._opened: dict[Path, Any] = {}

    def _check(self, shapes: Mapping[str, tuple[int, ...]], prefix: str, known: Sequence[str]) -> None:
        asked: dict[str, tuple[int, ...]] = {}
        for name, shape in shapes.items():
            piece = self.pieces.get(name, Piece(name))
            # A fused tensor ends where its last piece does.
            whole = (piece.rows[1], *shape[1:]) if piece.rows else shape
            asked[piece.key] = max(whole, asked.get(piece.key, whole))
        for key, shape in asked.items():
            check_shape(key, self.header.shapes.get(key), shape, self.path)
        unused = [
            key
            for key in self.header.files
            if key.startswith(prefix)
            and key not in asked
            and key.endswith(("weight", "bias", "scale"))
            and key.removeprefix(prefix) not in known
        ]
        if unused:
            logger.warning(
                "%s: the model's configuration has no use for %d of the tensors, the first is '%s'; is it "
                "another model's?",
                self.path,
                len(unused),
                unused[0],
            )

    def read(self, name: str) -> torch.Tensor:
        """One tensor, on the CPU, in the type of the file; float32 if the file stores it scaled."""
        piece = self.pieces[name]
        stored = self._slice(piece.key)
        tensor = stored[piece.rows[0] : piece.rows[1]] if piece.rows else stored[...]
        scale = next((key for key in scale_keys(piece.key) if key in self.header.files), None)
        tensor = tensor if scale is None else unscaled(tensor, self._slice(scale)[...], scale, self.path)
        return swap_halves(tensor) if piece.swap_halves else tensor

    def _slice(self, key: str) -> Any:
        file = self.header.files[key]
        if file not in self._opened:
            self._opened[file] = safe_open(file, framework="pt")
        return self._opened[file].get_slice(key)


def check_shape(key: str, stored: Sequence[int] | None, asked: Sequence[int], source: Path) -> None:
    """Whether a tensor of a file is there (else its shape is None), and as large as the model asks.

    Raises:
        SettingsError: it is not.
    """
    if stored is None:
        raise SettingsError.of(
            f"the tensor '{key}' of the model is not in the file; is it another model's?", str(source)
        )
    if tuple(stored) != tuple(asked):
        raise SettingsError.of(
            f"'{key}' is {list(stored)}, but the model's configuration asks for {list(asked)}; is it another model's?",
            str(source),
        )


def scale_keys(key: str) -> list[str]:
    """Names under which the scale of an 8-bit tensor may be stored."""
    return [key.removesuffix("weight") + name for name in SCALE_NAMES if key.endswith(".weight")]


def unscaled(tensor: torch.Tensor, scale: torch.Tensor, key: str, source: Path) -> torch.Tensor:
    """The values of a tensor stored in 8 bits, in float32.

    Raises:
        SettingsError: it has more than one scale.
    """
    if scale.numel() != 1:
        raise SettingsError.of(
            f"'{key}' has {scale.numel()} scales for one tensor; give a file in bfloat16, or in fp8 with one scale",
            str(source),
        )
    return tensor.float() * scale.float().reshape(())


def load_tensors(path: Path, dtype: torch.dtype, prefix: str = "") -> dict[str, torch.Tensor]:
    """All tensors of a file or folder, those of floating point in `dtype`.

    Args:
        prefix: if names begin with it, only those tensors are read: one part of a checkpoint that holds several.

    Raises:
        SettingsError: there is no such file, or it is not a whole safetensors file.
    """
    header = read_header(path)
    wanted = _part(header.files, prefix)
    tensors: dict[str, torch.Tensor] = {}
    for file in header.paths:
        with safe_open(file, framework="pt") as opened:
            tensors |= {key: opened.get_tensor(key) for key in wanted if header.files[key] == file}
    for key in list(tensors):
        scale = next((name for name in scale_keys(key) if name in tensors), None)
        tensors[key] = tensors[key] if scale is None else unscaled(tensors[key], tensors[scale], scale, path)
        tensors[key] = tensors[key].to(dtype) if tensors[key].is_floating_point() else tensors[key]
    return tensors


def promised_tensors(path: Path, dtype: torch.dtype, prefix: str = "") -> dict[str, torch.Tensor]:
    """What `load_tensors` would give, on the meta device: only headers are read."""
    shapes = read_header(path).shapes
    return {key: torch.empty(shapes[key], dtype=dtype, device="meta") for key in _part(shapes, prefix)}


def _part(keys: Iterable[str], prefix: str) -> list[str]:
    """The keys with this prefix; all, if none has it."""
    keys = list(keys)
    return [key for key in keys if key.startswith(prefix)] or keys


def assign(module: nn.Module, tensors: Mapping[str, torch.Tensor], source: Path) -> None:
    """Gives a module on the meta device all its values; tensors that it has no use for are left.

    Raises:
        SettingsError: a tensor is missing or has another shape.
    """
    empty = module.state_dict()
    for name, parameter in empty.items():
        check_shape(name, tensors[name].shape if name in tensors else None, parameter.shape, source)
    module.load_state_dict({name: tensors[name] for name in empty}, assign=True)


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
