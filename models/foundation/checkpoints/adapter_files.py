"""Reads adapter files of other programs and of earlier runs: as the factors of this run, or as updates of weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import safe_open

from models.foundation.checkpoints.headers import read_header
from utils import adapters
from utils.adapters.kinds import AdapterFile, AdapterKind, ModelNames, Tensors, Update
from utils.errors import UserError

OTHER_MARKS = {"LoHa": ".hada_"}
"""Parts of tensor names that identify adapters which are not trained here."""


def read_factors(path: Path, kind: AdapterKind, names: ModelNames, scales: Mapping[str, float]) -> Tensors:
    """The factors of a kind in a file or folder under our names, such that the scale of each module gives the effect
    that the file has in the program which wrote it.

    Raises:
        UserError: the file contains none of this kind, or they cannot be read.
    """
    file = _read(path)
    if not kind.is_in(list(file.tensors)):
        raise UserError.of(
            f"no {kind.name} factors in this file, {_what_is_there(file)}; give a {kind.name} here ([adapter] goes on "
            "from its own type)",
            str(path),
        )
    # Modules that this run does not adapt are reported with all others that have no counterpart.
    return kind.from_file(file, names, lambda module: scales.get(module, 1.0))


def read_updates(path: Path, names: ModelNames) -> Mapping[str, Update]:
    """The updates of weights by the adapter in a file or folder, by module.

    Raises:
        UserError: it contains no adapter of a known kind, or one that cannot be read.
    """
    file = _read(path)
    kind = adapters.recognised(file.tensors)
    if kind is None:
        known = ", ".join(kind.name for kind in adapters.available().values())
        raise UserError.of(
            f"no factors of an adapter that is known here ({known}) in this file, {_what_is_there(file)}", str(path)
        )
    try:
        return kind.updates(kind.from_file(file, names, lambda module: 1.0))
    except UserError:
        raise
    except ValueError as error:
        raise UserError.of(str(error), str(path)) from error


def _read(path: Path) -> AdapterFile:
    files = read_header(path).paths
    if not files:
        raise UserError.of("this file is empty; download it again", str(path))
    with safe_open(files[0], framework="pt") as opened:
        tensors = {key: opened.get_tensor(key) for key in opened.keys()}
        return AdapterFile(tensors, opened.metadata() or {}, files[0])


def _what_is_there(file: AdapterFile) -> str:
    marks = {**OTHER_MARKS, **{kind.name: kind.mark for kind in adapters.available().values()}}
    other = next((name for name, mark in marks.items() if any(mark in key for key in file.tensors)), None)
    return f"it is a {other}" if other else f"its first tensor is '{next(iter(file.tensors), 'none')}'"
