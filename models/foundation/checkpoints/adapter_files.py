"""Reads adapter files of other programs and of earlier runs: as the factors of this run, or as updates of weights.

Every tensor of a file is used, or told: in an error, or in a warning if it is for what is not loaded of the model.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Container, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from models.foundation.checkpoints.headers import opened, read_header
from models.foundation.checkpoints.recognition import owner_of_names
from utils import adapters
from utils.adapters import in_full
from utils.adapters.differences import WholeValues, differences, with_dora
from utils.adapters.file_names import Contents, contents
from utils.adapters.kinds import DORA_SCALE, LAYOUT, AdapterFile, AdapterKind, Entry, ModelNames, Tensors, Update
from utils.adapters.soundness import check_entry
from utils.errors import UserError

logger = logging.getLogger(__name__)

Item = TypeVar("Item")
OTHER_MARKS = {
    "OFT with other lengths, or of PEFT": (".rescale", ".oft_R", ".oft_S", ".oft_diag"),
    "GLoRA": (".a1.weight", ".a2.weight", ".b1.weight", ".b2.weight"),
    "IA3 of LyCORIS": (".on_input",),
    "LoRA with biases": (".lora_B.bias", ".lora_up.bias"),
    "replacement of weights": (".set_weight", ".reshape_weight"),
    "textual inversion": ("bundle_emb", "emb_params"),
}
"""Parts of tensor names that identify what is not read here."""
TEXT_ENCODERS = ("lora_te", "text_encoder", "te1_", "te2_")
"""What the names of a text encoder's modules begin with."""


def read_factors(path: Path, kind: AdapterKind, names: ModelNames, scales: Mapping[str, float]) -> Tensors:
    """The factors of a kind in a file or folder under our names, such that the scale of each module gives the effect
    that the file has in the program which wrote it.

    Raises:
        UserError: the file contains none of this kind, something else too, or they cannot be read.
    """
    return read_existing(path, kind, names, scales)[0]


def read_existing(
    path: Path, kind: AdapterKind, names: ModelNames, scales: Mapping[str, float], trained: Container[str] = ()
) -> tuple[Tensors, Mapping[str, Update]]:
    """As `read_factors`, and what the file or those beside it have for parameters that are trained in full.

    Args:
        trained: the names of these parameters.

    Raises:
        UserError: as `read_factors`, or it has such changes of other parameters.
    """
    file = _read(path)
    kinds = {kind, *filter(None, map(adapters.kind_of, names.modules.values()))}
    if not any(adapters.is_in(one, file.tensors) for one in kinds):
        raise UserError.of(
            f"no {kind.name} factors in this file, {_what_is_there(file)}; give a {kind.name} here ([adapter] goes on "
            "from its own type)",
            str(path),
        )
    found = _checked(contents(file, names), file, path)
    whole = Contents([(other, entry) for other, entry in found.entries if other is None])
    updates = _joined(whole, path, lambda _, entry: differences(entry, names)) | _weights_beside(file, names)
    updates = {name: update for name, update in updates.items() if name in trained or not in_full.is_nothing(update)}
    untrained = [name for name in updates if name not in trained]
    factors_of = Contents([(other, entry) for other, entry in found.entries if other is not None])
    others = [
        entry.name for other, entry in factors_of.entries if other is not kind and not _is_of(other, entry, names)
    ]
    if others or untrained:
        others = others or untrained
        raise UserError.of(
            f"{_count(others, found)} have something else than {kind.name} factors, {_first(others)}; training goes on "
            f"from a file with {kind.name} factors alone, or with changes of what [model] train names too; as a whole "
            "it may be given in [[model.preset_adapters]]",
            str(path),
        )
    # Modules that this run does not adapt are reported with all others that have no counterpart.
    factors = _joined(
        factors_of, path, lambda own, entry: own.factors(entry, names, lambda module: scales.get(module, 1.0))
    )
    return factors, updates


def _is_of(kind: AdapterKind, entry: Entry, names: ModelNames) -> bool:
    """Whether this run has an adapter of this kind where a file has one."""
    own = (names.modules.get(module) for module in entry.target.modules)
    return kind in {adapters.kind_of(module) for module in own if module is not None}


def _weights_beside(file: AdapterFile, names: ModelNames) -> dict[str, Update]:
    """The weights that were trained in full beside an adapter and lie beside its file, by name.

    Raises:
        UserError: one is not there, or no one of this model.
    """
    found: dict[str, Update] = {}
    for path in in_full.beside(file).values():
        part = header_of(path).get(in_full.OF_PART, "")
        with opened(path) as one:
            for key in one.keys():
                name = f"{part}.{key}" if names.has_parts else key
                if name not in names.shapes:
                    raise UserError.of(f"'{key}' is no parameter of this model; is it another model's?", str(path))
                found[name] = WholeValues(one.get_tensor(key))
    return found


def read_ranks(path: Path, kind: AdapterKind, names: ModelNames) -> Mapping[str, int]:
    """The rank that a file or folder has for each of our modules.

    Raises:
        UserError: it contains none of this kind, or they cannot be read.
    """
    file = _read(path)
    found = _checked(contents(file, names), file, path)
    ranks = _joined(found, path, lambda own, entry: kind.ranks(entry, names) if own is kind else {})
    if not ranks:
        raise UserError.of(
            f"no {kind.name} factors in this file, {_what_is_there(file)}; give a {kind.name}", str(path)
        )
    return ranks


def read_updates(path: Path, names: ModelNames) -> Mapping[str, Update]:
    """The updates of parameters by the adapter in a file or folder, by the parameter's name.

    Raises:
        UserError: it contains no adapter of a known kind, something else too, or one that cannot be read.
    """
    found = read_entries(path, names)
    whole = _weights_beside(_headed(path), names)
    return _joined(found, path, lambda kind, entry: _updates(kind, entry, names)) | whole


def read_entries(path: Path, names: ModelNames) -> Contents:
    """What the adapter in a file or folder has for which module, all of which can be used.

    Raises:
        UserError: as `read_updates`.
    """
    file = _read(path)
    found = contents(file, names)
    if not (found.entries or found.strangers or found.beside):
        known = ", ".join(kind.name for kind in adapters.available().values())
        raise UserError.of(
            f"no factors of an adapter that is known here ({known}) in this file, {_what_is_there(file)}", str(path)
        )
    return _checked(found, file, path)


def _updates(kind: AdapterKind | None, entry: Entry, names: ModelNames) -> dict[str, Update]:
    """The updates by what a file has for a module, by the parameter's name."""
    if kind is None:
        return differences(entry, names)
    updates = dict(kind.updates(entry, names))
    if DORA_SCALE in entry.tensors and updates:
        updates = with_dora(updates, entry.tensors[DORA_SCALE], entry)
    biases = {f"{module}.bias": update for module, update in kind.bias_updates(entry, names).items()}
    return {f"{module}.weight": update for module, update in updates.items()} | biases


def _joined(
    found: Contents, path: Path, read: Callable[[AdapterKind | None, Entry], Mapping[str, Item]]
) -> dict[str, Item]:
    """What is read of each entry, by our names.

    Raises:
        UserError: an entry is damaged, or two of them are for one module.
    """
    joined: dict[str, Item] = {}
    by: dict[str, str] = {}
    for kind, entry in found.entries:
        try:
            check_entry(entry)
            own = read(kind, entry)
        except UserError:
            raise
        except ValueError as error:
            raise UserError.of(str(error), str(path)) from error
        twice = next((name for name in own if name in joined), None)
        if twice:
            raise UserError.of(
                f"'{by[twice]}' and '{entry.name}' both adapt '{twice}', and only one of them would count elsewhere; "
                "leave one of them out of the file",
                str(path),
            )
        joined |= own
        by |= dict.fromkeys(own, entry.name)
    return joined


def _checked(found: Contents, file: AdapterFile, path: Path) -> Contents:
    """The contents, all of which can be used.

    Raises:
        UserError: modules are not this model's, or tensors belong to no known kind; says how many are.
    """
    if found.strangers:
        texts = [name for name in found.strangers if name.startswith(TEXT_ENCODERS)]
        others = [name for name in found.strangers if name not in texts]
        if others:
            owner = owner_of_names(others)
            looks = f"they look like names of {owner}; " if owner else ""
            fit = f"the other {len(found.entries)} fit; " if found.entries else ""
            raise UserError.of(
                f"{_count(others, found)} are not this model's, {_first(others)}; {looks}{fit}give an adapter of this "
                "model in this size",
                str(path),
            )
        raise UserError.of(
            f"{_count(texts, found)} are a text encoder's, {_first(texts)}; those are read where [model] trains that "
            "text encoder (text_encoder_1_lr of sdxl and sd15); otherwise leave them out of the file",
            str(path),
        )
    if found.unread:
        kinds = sorted({_kind_of(key) for key in found.unread} - {None})
        what = f" ({', '.join(kinds)})" if kinds else ""
        raise UserError.of(
            f"{len(found.unread)} of its {len(file.tensors)} tensors are of a form that is not read here{what}, "
            f"{_first(found.unread)}; leave them out of the file, or give another",
            str(path),
        )
    if found.beside:
        said = f"{_count(found.beside, found)} are for what is not loaded of this model, {_first(found.beside)}"
        if not found.entries:
            raise UserError.of(f"{said}; give an adapter of what is trained", str(path))
        logger.warning("%s: %s; they are left out", path, said)
    return found


def _count(names: Sequence[str], found: Contents) -> str:
    modules = {*found.strangers, *found.beside, *(entry.name for _, entry in found.entries)}
    return f"{len(set(names))} of its {len(modules)} modules"


def _first(names: Sequence[str]) -> str:
    return f"the first is '{names[0]}'"


def file_in(path: Path) -> Path:
    """The file of an adapter: the path itself, or the one in the folder that it names.

    Raises:
        UserError: there is none, or there are several.
    """
    files = read_header(path).paths
    if not files:
        raise UserError.of("this file is empty; download it again", str(path))
    if len(files) > 1:
        # An export of ours with names of its own has a file for each program.
        files = [file for file in files if header_of(file).get(LAYOUT) == "diffusers"] or files
    if len(files) > 1:
        raise UserError.of(
            f"there are {len(files)} files here, {', '.join(file.name for file in files[:3])} ...; give one of them",
            str(path),
        )
    return files[0]


def header_of(file: Path) -> Mapping[str, str]:
    """The metadata in a file's header."""
    with opened(file) as opened_file:
        return opened_file.metadata() or {}


def weights_beside(path: Path) -> Sequence[str]:
    """The names of the files beside an adapter with what was trained in full together with it."""
    return list(in_full.beside(_headed(path)))


def _headed(path: Path) -> AdapterFile:
    """An adapter's file without its tensors."""
    file = file_in(path)
    return AdapterFile({}, header_of(file), file)


def _read(path: Path) -> AdapterFile:
    path = file_in(path)
    with opened(path) as file:
        return AdapterFile({key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}, path)


def _what_is_there(file: AdapterFile) -> str:
    kind = adapters.recognised(file.tensors)
    other = kind.name if kind else next(filter(None, map(_kind_of, file.tensors)), None)
    return f"it is a {other}" if other else f"its first tensor is '{next(iter(file.tensors), 'none')}'"


def _kind_of(key: str) -> str | None:
    """What a tensor belongs to that is not read here."""
    return next((name for name, marks in OTHER_MARKS.items() if any(mark in key for mark in marks)), None)
