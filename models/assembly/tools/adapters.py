"""Adapters made of adapters: merged, made smaller, or written in another layout."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from models.assembly.tools.low_rank import Cut, Pair, joined, of_updates
from models.assembly.tools.model import Model
from models.assembly.tools.writing import Place, Standing, check_layout, inherited, write_factors, write_lora
from models.foundation.checkpoints.adapter_files import (
    file_in,
    header_of,
    read_entries,
    read_updates,
    weights_beside,
)
from utils.adapters import presets
from utils.adapters.kinds import ADAPTER, DORA_SCALE, AdapterKind, Entry, Tensors, Update
from utils.adapters.lora import LoraSettings
from utils.adapters.lora_factors import LowRankUpdate
from utils.adapters.magnitudes import MAGNITUDE
from utils.errors import UserError
from utils.settings.choices import type_of
from utils.settings.schema import AdapterSettings

logger = logging.getLogger(__name__)

Given = Sequence[tuple[Path, float]]
"""Files of adapters, with their weights."""
Changes = Mapping[str, Sequence[tuple[Update, float]]]
"""Parameter -> the updates that it gets, with their weights."""


def read(model: Model, given: Given) -> Changes:
    """The updates by all files.

    Raises:
        UserError: one is no adapter of this model.
    """
    found = []
    for path, weight in given:
        updates = read_updates(path, model.names)
        presets.check_fits(model.denoiser, updates, str(path))
        found.append((updates, weight))
    return presets.changes_of(found)


def merge(model: Model, given: Given, place: Place, cut: Cut | None) -> None:
    """Merges adapters into one: exactly, with the sum of their ranks; or to the nearest one that `cut` allows.

    Raises:
        UserError: one cannot be read; or one is no product of factors, and no rank is given.
    """
    changes = for_lora(model, read(model, given))
    whole = [name for name, updates in changes.items() if not _is_low_rank(updates)]
    if whole and cut is None:
        raise UserError.of(
            f"the updates of {len(whole)} of {len(changes)} layers are no product of two factors, the first is "
            f"'{whole[0]}'; give --rank or --energy for the nearest LoRA to them",
            where="merge",
        )
    metadata = inherited([header_of(file_in(path)) for path, _ in given], model)
    if cut is None:
        write_lora(model, {_module(name): joined(updates) for name, updates in changes.items()}, place, metadata)
    else:
        write_lora(model, lowered(model, changes, cut), place, metadata)


def lowered(model: Model, changes: Changes, cut: Cut) -> dict[str, Pair]:
    """The nearest factors to updates; how near they are is told."""
    pairs, kept, total = {}, 0.0, 0.0
    for name, updates in changes.items():
        base = None if _is_low_rank(updates) else model.weight(name)
        pair, own, whole = of_updates(updates, base, cut)
        pairs[_module(name)] = pair
        kept, total = kept + own, total + whole
    tell_kept(pairs, kept, total)
    return pairs


def tell_kept(pairs: Mapping[str, Pair], kept: float, total: float) -> None:
    """Tells the ranks, and how much of the update they have."""
    ranks = sorted(len(pair.down) for pair in pairs.values())
    if ranks:
        said = f"{ranks[0]} to {ranks[-1]}" if ranks[0] < ranks[-1] else str(ranks[0])
        share = kept / total if total else 1.0
        logger.info("%d layers of rank %s, with %.2f%% of the update's square", len(ranks), said, 100 * share)


def for_lora(model: Model, changes: Changes) -> dict[str, Sequence[tuple[Update, float]]]:
    """The updates that a LoRA can have: of the weights of layers. The others are told, and left out."""
    fitting = {name: updates for name, updates in changes.items() if is_layer(model, name)}
    others = [name for name in changes if name not in fitting]
    if others:
        logger.warning(
            "%d of %d updates are of parameters that a LoRA does not change, and are left out; the first is '%s'. "
            "`merge --into_base` uses them",
            len(others),
            len(changes),
            others[0],
        )
    return fitting


def is_layer(model: Model, name: str) -> bool:
    """Whether a parameter is the weight of a layer that an adapter may be for."""
    return name.endswith(".weight") and _module(name) in model.names.modules


def resize(model: Model, path: Path, place: Place, cut: Cut) -> None:
    """Writes the nearest LoRA of another rank.

    Raises:
        UserError: it cannot be read.
    """
    merge(model, [(path, 1.0)], place, cut)


def convert(model: Model, path: Path, place: Place) -> None:
    """Writes an adapter in another layout, of the kind that it is.

    Raises:
        UserError: it cannot be read, has several kinds, or the layout has no place for it.
    """
    found = read_entries(path, model.names)
    if whole := weights_beside(path):
        raise UserError.of(
            f"has weights beside it that were trained in full, in '{whole[0]}', which a converted adapter would lack; "
            "runs export both layouts, `merge --into_base` uses both, and `resize --rank` makes a LoRA of what it can",
            str(path),
        )
    kinds = {type_of(kind.settings) if kind else None for kind, _ in found.entries}
    if len(kinds) > 1 or None in kinds:
        raise UserError.of(
            "has adapters of several kinds, or whole differences of weights, which no layout but its own has; "
            "`resize --rank` makes a LoRA of it",
            str(path),
        )
    metadata, (kind,) = inherited([header_of(file_in(path))], model), kinds
    check_layout(model, kind, place.layout)
    has_lengths = any(DORA_SCALE in entry.tensors or MAGNITUDE in entry.tensors for _, entry in found.entries)
    if kind == "lora" and not has_lengths:
        changes = for_lora(model, read(model, [(path, 1.0)]))
        write_lora(model, {_module(name): joined(updates) for name, updates in changes.items()}, place, metadata)
        return
    if has_lengths and place.layout in ("peft", "lycoris"):
        raise UserError.of("DoRA is written for diffusers and ComfyUI alone", where=f"--layout {place.layout}")
    standing = _standing(model, has_lengths=has_lengths)
    write_factors(
        model, kind, _factors(model, path, found.entries, standing), _settings(kind), place, metadata, standing
    )


def _settings(kind: str) -> AdapterSettings | None:
    """Of a kind whose files depend on them."""
    return LoraSettings(type="lora", rank=1, dora=True) if kind == "lora" else None


def _factors(
    model: Model,
    path: Path,
    entries: Sequence[tuple[AdapterKind, Entry]],
    standing: Mapping[str, Standing],
) -> Tensors:
    names, factors = replace(model.names, modules=standing), {}
    for kind, entry in entries:
        try:
            own = kind.factors(entry, names, lambda _: 1.0)
        except ValueError as error:
            raise UserError.of(f"{error}; `resize --rank` makes a LoRA of it", str(path)) from error
        if twice := next((name for name in own if name in factors), None):
            raise UserError.of(f"adapts the same layer twice: '{twice}'; leave one of them out", str(path))
        factors |= own
    return factors


def _standing(model: Model, *, has_lengths: bool) -> dict[str, Standing]:
    if not has_lengths:
        return dict.fromkeys(model.names.modules, Standing())
    from utils.adapters.peft_layers import Magnitude

    with torch.device("meta"):
        return {
            name: Standing(lora_magnitude_vector={ADAPTER: Magnitude(module)})
            for name, module in model.names.modules.items()
        }


def _is_low_rank(updates: Sequence[tuple[Update, float]]) -> bool:
    return all(isinstance(update, LowRankUpdate) for update, _ in updates)


def _module(name: str) -> str:
    return name.removesuffix(".weight")
