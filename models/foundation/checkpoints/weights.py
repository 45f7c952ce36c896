"""Weights on disk -> the parameters that this process holds.

A denoiser is built from its configuration on the meta device, where it needs no memory, and cut into layers. Only then
are the tensors of this process's stage read by memory map, each in the form in which it is kept.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from models.foundation.checkpoints.gguf_files import GgufFile, is_gguf
from models.foundation.checkpoints.headers import opened, read_header
from models.foundation.checkpoints.key_layouts import KeyLayout, Piece, swap_halves
from models.foundation.checkpoints.recognition import GUESS
from models.foundation.checkpoints.storage import StorageRules
from utils.errors import UserError
from utils.first_values import none_without_memory
from utils.quantised.linear import QuantisedLinear

logger = logging.getLogger(__name__)

Tensors = dict[str, torch.Tensor]

SCALE_NAMES = ("scale_weight", "weight_scale")
"""Names of the factor by which an 8-bit `weight` must be multiplied."""


class Weights:
    """The tensors of a model under our names, read on demand.

    Args:
        path: a .safetensors file, a folder with one or its shards, or a .gguf file.
        module: the model (on the meta device will do), for names and shapes.
        layout: the table by which another program names them; None if the files use our names.

    Attributes:
        unused: names of tensors in the files that the model does not have.
    """

    def __init__(self, path: Path, module: nn.Module, layout: KeyLayout | None = None):
        self.path = path
        header = read_header(path, with_gguf=True)
        shapes = {name: tuple(parameter.shape) for name, parameter in module.state_dict().items()}
        try:
            self.pieces = layout.pieces(shapes, header.files) if layout else {name: Piece(name) for name in shapes}
        except ValueError as error:
            raise UserError.of(f"{error}: this file does not fit the model's configuration", str(path)) from error
        self.header = header
        self.unused = self._checked(
            shapes, layout.prefix(header.files) if layout else "", layout.unused if layout else ()
        )
        self._opened: dict[Path, Any] = {}

    def _checked(self, shapes: Mapping[str, tuple[int, ...]], prefix: str, known: Sequence[str]) -> list[str]:
        asked: dict[str, tuple[int, ...]] = {}
        for name, shape in shapes.items():
            piece = self.pieces.get(name, Piece(name))
            # A fused tensor ends with its last piece.
            whole = (piece.rows[1], *shape[1:]) if piece.rows else shape
            whole = (math.prod(whole),) if piece.shape else whole
            asked[piece.key] = max(whole, asked.get(piece.key, whole))
        for key, shape in asked.items():
            check_shape(key, self.header.shapes.get(key), shape, self.path)
        scales = {name for key in asked for name in scale_keys(key)}
        return [
            key
            for key in self.header.files
            if key.startswith(prefix)
            and key not in asked
            and key not in scales
            and key.endswith(("weight", "bias", "scale"))
            and not key.removeprefix(prefix).startswith(tuple(known))
        ]

    def tell_unused(self, likeness: str = "") -> None:
        """Says that some of the tensors are not used, if this is so, and whose they look like, if that is known."""
        if self.unused:
            logger.warning(
                "%s: the model's configuration has no use for %d of the tensors, the first is '%s'%s",
                self.path,
                len(self.unused),
                self.unused[0],
                likeness or GUESS,
            )

    def read(self, name: str) -> torch.Tensor:
        """One tensor, on the CPU, in the type of the file; float32 if the file stores it scaled or in codes."""
        piece = self.pieces[name]
        stored = self._slice(piece.key)
        tensor = stored[piece.rows[0] : piece.rows[1]] if piece.rows else stored[...]
        scale = next((key for key in scale_keys(piece.key) if key in self.header.files), None)
        if scale is not None:
            tensor = unscaled(tensor, self._slice(scale)[...], scale, self.path, piece.rows)
        tensor = swap_halves(tensor) if piece.swap_halves else tensor
        return tensor if piece.shape is None else tensor.reshape(piece.shape)

    def _slice(self, key: str) -> Any:
        file = self.header.files[key]
        if file not in self._opened:
            self._opened[file] = GgufFile(file) if is_gguf(file) else safe_open(file, framework="pt")
        return self._opened[file].get_slice(key)


def check_shape(key: str, stored: Sequence[int] | None, asked: Sequence[int], source: Path) -> None:
    """Whether a tensor exists in a file (otherwise its shape is None) and has the shape that the model requires.

    Raises:
        UserError: it does not.
    """
    if stored is None:
        raise UserError.of(f"the tensor '{key}' of the model is not in the file; is it another model's?", str(source))
    if tuple(stored) != tuple(asked):
        raise UserError.of(
            f"'{key}' is {list(stored)}, but the model's configuration asks for {list(asked)}; is it another model's?",
            str(source),
        )


def scale_keys(key: str) -> list[str]:
    """Names under which the scale of an 8-bit tensor may be stored."""
    return [key.removesuffix("weight") + name for name in SCALE_NAMES if key.endswith(".weight")]


def unscaled(
    tensor: torch.Tensor, scale: torch.Tensor, key: str, source: Path, rows: tuple[int, int] | None = None
) -> torch.Tensor:
    """The values of a tensor stored in 8 bits, in float32.

    Args:
        scale: of all of the tensor in the file, one or one for each row.
        rows: which of its rows these are, from the first to before the last; None for all.

    Raises:
        UserError: there is another number of scales.
    """
    if scale.numel() == 1:
        return tensor.float() * scale.float().reshape(())
    own = scale if rows is None else scale[slice(*rows)]
    if tensor.ndim != 2 or tuple(own.shape) not in ((len(tensor),), (len(tensor), 1)):
        raise UserError.of(
            f"'{key}' has {scale.numel()} scales for one tensor; give a file in bfloat16, or in fp8 with one scale for "
            "a tensor or for each of its rows",
            str(source),
        )
    return tensor.float() * own.float().reshape(-1, 1)


def load_tensors(path: Path, dtype: torch.dtype, prefix: str = "") -> dict[str, torch.Tensor]:
    """All tensors of a file or folder; floating-point tensors in `dtype`.

    Args:
        prefix: if some names begin with it, only these tensors are read: one part of a checkpoint with several parts.

    Raises:
        UserError: there is no such file, or it is not a whole safetensors file.
    """
    mapped = mapped_tensors(path, prefix)
    return {key: tensor.to(dtype) if tensor.is_floating_point() else tensor for key, tensor in _each(mapped)}


@dataclass(frozen=True)
class ScaledTensor:
    """A tensor stored in 8 bits, whose values `[...]` gives, in float32.

    Attributes:
        stored: the numbers of the file.
        scale: their factor, one number or one for each row.
        key, source: the name of the scale and its file, for messages.
    """

    stored: torch.Tensor
    scale: torch.Tensor
    key: str
    source: Path

    def __getitem__(self, index: Any) -> torch.Tensor:
        """Some of the values.

        Raises:
            UserError: there is more than one scale, and not one for each row.
        """
        return unscaled(self.stored, self.scale, self.key, self.source)[index]


def mapped_tensors(path: Path, prefix: str = "") -> dict[str, torch.Tensor | ScaledTensor]:
    """The tensors of `load_tensors`, of which `[...]` gives the values, in the type of the file; until then they lie in
    the file, and take no memory of the process."""
    header = read_header(path)
    wanted = _part(header.files, prefix)
    tensors: dict[str, torch.Tensor] = {}
    for file in header.paths:
        with opened(file) as one:
            tensors |= {key: one.get_tensor(key) for key in wanted if header.files[key] == file}
    scales = _scales(tensors)
    return {
        key: ScaledTensor(tensor, tensors[scales[key]], scales[key], path) if key in scales else tensor
        for key, tensor in tensors.items()
        if key not in scales.values()
    }


def _scales(keys: Collection[str]) -> dict[str, str]:
    """The names of scaled tensors, and those of their scales, among the names of a file."""
    return {key: name for key in keys for name in scale_keys(key) if name in keys}


def _each(mapped: Mapping[str, torch.Tensor | ScaledTensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """The values of all tensors, one after another."""
    return ((key, tensor[...]) for key, tensor in mapped.items())


def meta_tensors(path: Path, dtype: torch.dtype, prefix: str = "") -> dict[str, torch.Tensor]:
    """The result of `load_tensors` on the meta device, for which only headers are read."""
    shapes = read_header(path).shapes
    keys, scales = _part(shapes, prefix), _scales(shapes).values()
    return {key: torch.empty(shapes[key], dtype=dtype, device="meta") for key in keys if key not in scales}


def _part(keys: Iterable[str], prefix: str) -> list[str]:
    """The keys with this prefix; all keys if none has it."""
    keys = list(keys)
    return [key for key in keys if key.startswith(prefix)] or keys


def assign(module: nn.Module, tensors: Mapping[str, torch.Tensor], source: Path) -> None:
    """Gives a module on the meta device all its values, and ignores other tensors.

    Raises:
        UserError: a tensor is missing or has another shape.
    """
    empty = module.state_dict()
    for name, parameter in empty.items():
        check_shape(name, tensors[name].shape if name in tensors else None, parameter.shape, source)
    module.load_state_dict({name: tensors[name] for name in empty}, assign=True)


def build_empty(factory: Callable[[], nn.Module]) -> nn.Module:
    """A module whose parameters are on the meta device; buffers and plain attributes are real, since their values are
    computed when it is built and are not in files."""
    from accelerate import init_empty_weights

    with none_without_memory(), init_empty_weights(include_buffers=False):
        return factory()


def materialise(
    module: nn.Module, names: Iterable[str], read: Callable[[str], torch.Tensor], storage: StorageRules
) -> None:
    """Gives real values to the meta parameters `names` of a module, each in its form, one after another.

    The parameters keep their identity, so that layers which already hold them hold the values too.
    """
    parameters = dict(module.named_parameters())
    for name in names:
        empty, owner = parameters[name], module.get_submodule(name.rpartition(".")[0])
        if empty.is_meta and isinstance(owner, QuantisedLinear) and empty is owner.weight:
            owner.fill(read(name))
        elif empty.is_meta:
            values = storage.of(name).keep(read(name))
            real = nn.Parameter(values.clone() if values.data_ptr() % 16 else values, requires_grad=empty.requires_grad)
            torch.utils.swap_tensors(empty, real)


class EnsembleWeights:
    """The tensors of an ensemble under its names, read on demand.

    Args:
        weights: part -> its tensors on disk.
        modules: part -> a function that loads the whole module, for parts whose files their own library must read. It
            is called once, by a process that holds a tensor of the part.
    """

    def __init__(self, weights: Mapping[str, Weights], modules: Mapping[str, Callable[[], nn.Module]]):
        self._read = {
            **{part: one.read for part, one in weights.items()},
            **{part: _reading(load) for part, load in modules.items()},
        }

    def read(self, name: str) -> torch.Tensor:
        """One tensor, on the CPU."""
        part, _, rest = name.partition(".")
        return self._read[part](rest)


def _reading(load: Callable[[], nn.Module]) -> Callable[[str], torch.Tensor]:
    tensors = cache(lambda: dict(load().named_parameters()))
    return lambda name: tensors()[name].detach()


@dataclass(frozen=True)
class CheckpointNames:
    """The names of a text encoder in a checkpoint with other parts.

    Attributes:
        prefix: of its tensors. A file without this prefix contains only the encoder, with the names of transformers.
        convert: tensors, still with the prefix -> tensors under the names of transformers; None if these names follow
            the prefix.
    """

    prefix: str = ""
    convert: Callable[[Tensors], Tensors] | None = None

    def tensors(self, read: Callable[[Path, torch.dtype, str], Tensors], source: Path, dtype: torch.dtype) -> Tensors:
        """The tensors that `read` gives for a file or folder, under the names of transformers."""
        tensors = read(source, dtype, self.prefix)
        if not all(name.startswith(self.prefix) for name in tensors):
            return tensors
        if self.convert:
            return self.convert(dict(_each(tensors)))
        return {name.removeprefix(self.prefix): tensor for name, tensor in tensors.items()}
