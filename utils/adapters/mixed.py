"""Adapters of several kinds on one denoiser, as `type` in `[[adapter.rules]]` asks for them: the settings of each rule,
and files with all of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

from pydantic import ValidationError

from utils import adapters
from utils.adapters.kinds import ADAPTER_FILE, COMFYUI, COMFYUI_FILE, AdapterFile, AdapterKind, ExportWishes, Tensors
from utils.errors import Problem, UserError
from utils.settings.adapter_schema import AdapterRule, AdapterSettings
from utils.settings.model_schema import ModelSettings

LYCORIS = "the kinds of adapters are mixed: LyCORIS applies the file to diffusers' models, diffusers itself does not"
OF_ALL = ("include", "exclude", "rules", "init_from_existing", "lycoris_config", "dtype", "convolutions")
"""Keys of `[adapter]` that are for all modules, of whatever kind."""
OF_RULES = ("type", "rank", "alpha", "dropout")
"""Keys that a rule has itself."""


def kinds_of(settings: AdapterSettings) -> list[AdapterKind]:
    """The kinds that settings name, that of most modules first."""
    named = dict.fromkeys([settings.type, *(rule.type for rule in settings.rules if rule.type)])
    return list(map(adapters.find, named))


def read_by(settings: AdapterSettings) -> str:
    """Who reads the file for diffusers, where that is not diffusers itself."""
    kinds = kinds_of(settings)
    return LYCORIS if len(kinds) > 1 else kinds[0].read_by


def of_rules(settings: AdapterSettings) -> list[AdapterSettings]:
    """The settings by which each rule's modules are adapted.

    Raises:
        UserError: a rule names no kind, or keys that its kind does not have.
    """
    return [_of_rule(settings, rule, number) for number, rule in enumerate(settings.rules, start=1)]


def _of_rule(settings: AdapterSettings, rule: AdapterRule, number: int) -> AdapterSettings:
    """Its rank is also that of convolutions."""
    of_all = {"conv_dim": None, "conv_alpha": None} if rule.rank else {}
    if rule.type is None:
        return settings.model_copy(update={**of_all, **rule.sizes})
    place = f"[[adapter.rules]] {number}"
    try:
        chosen = adapters.find(rule.type).settings
    except ValueError as error:
        raise UserError.of(str(error), where=f"{place} type") from error
    known = [key for key in chosen.model_fields if key not in (*OF_ALL, *OF_RULES, *chosen.of_runs)]
    if strange := [key for key in rule.keys if key not in known]:
        why = "stands in the rule itself" if strange[0] in OF_RULES else "is none of a rule"
        raise UserError.of(
            f"`{strange[0]}` {why}; those of a {rule.type} are {', '.join(known)}", where=f"{place} keys"
        )
    shared = {key: getattr(settings, key) for key in type(settings).model_fields if key in chosen.model_fields}
    own = {**{key: of_all[key] for key in of_all if key in chosen.model_fields}, **rule.keys, **rule.sizes}
    left = {key: value for key, value in shared.items() if key not in (*chosen.of_runs, "rules", "type")}
    # A rank of 0 adapts nothing.
    own = {key: value for key, value in own.items() if (key, value) != ("rank", 0)}
    try:
        return chosen.model_validate({**left, **own, "type": rule.type})
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise UserError.of(f"`{key}` of a {rule.type}: {first['msg']}", where=place) from error


def check(settings: AdapterSettings, model: ModelSettings) -> None:
    """Whether the kinds that the rules name can be told what they are told, and be in one file.

    Raises:
        UserError: lists what cannot.
    """
    if problems := list(_problems(settings, model)):
        raise UserError(problems)


def _problems(settings: AdapterSettings, model: ModelSettings) -> Iterator[Problem]:
    chosen = {number: one for number, one in enumerate(of_rules(settings), 1) if settings.rules[number - 1].type}
    kinds = kinds_of(settings)
    alone = [kind for kind in kinds if not kind.mixes]
    if len(kinds) > 1 and alone:
        others = ", ".join(kind.name for kind in kinds if kind is not alone[0])
        yield Problem(
            "",
            "[[adapter.rules]] type",
            f"{alone[0].name} is in files of its own, which have no place for {others}; take one kind for all",
        )
    for number, one in chosen.items():
        for key, message in one.problems(model):
            yield Problem("", f"[[adapter.rules]] {number} {key}", message)
        for key in one.of_files:
            others = [settings, *chosen.values()]
            if any(other.type == one.type and getattr(other, key) != getattr(one, key) for other in others):
                message = f"has to be the same for all modules of a {one.type}, since a file says it once"
                yield Problem("", f"[[adapter.rules]] {number} {key}", message)
        if len(kinds) > 1 and getattr(one, "dora", False):
            yield Problem("", f"[[adapter.rules]] {number} dora", "is in no file with other kinds; leave it out")
    if len(kinds) > 1 and getattr(settings, "dora", False):
        yield Problem("", "[adapter] dora", "is in no file with other kinds, which the rules name; leave it out")


def to_files(factors: Tensors, settings: AdapterSettings, wishes: ExportWishes) -> Mapping[str, AdapterFile | str]:
    """The files of an adapter of one kind, or of several: then in the names of LyCORIS and of ComfyUI.

    Raises:
        UserError: ComfyUI would take a part of it for another.
        ValueError: a layout has no place for a module.
    """
    parts = _by_kind(factors, settings, wishes)
    if len(parts) == 1:
        ((kind, own, chosen),) = parts
        return kind.to_files(own, chosen, wishes)
    files: dict[str, AdapterFile] = {}
    if "diffusers" in wishes.formats:
        named = [kind.in_lycoris(own, chosen, wishes) for kind, own, chosen in parts]
        files[ADAPTER_FILE] = AdapterFile(_joined(named), wishes.metadata)
    if COMFYUI in wishes.formats and wishes.names.layout:
        _check_fused([own for _, own, _ in parts], wishes)
        for_comfyui = replace(wishes, formats=(COMFYUI,))
        made = [kind.to_files(own, chosen, for_comfyui)[COMFYUI_FILE] for kind, own, chosen in parts]
        metadata = _joined(file.metadata for file in made)
        files[COMFYUI_FILE] = AdapterFile(_joined(file.tensors for file in made), metadata)
    return files


def _joined(parts: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    return {key: value for part in parts for key, value in part.items()}


def _by_kind(
    factors: Tensors, settings: AdapterSettings, wishes: ExportWishes
) -> list[tuple[AdapterKind, Tensors, AdapterSettings]]:
    """The factors of each kind with what it is told."""
    told: dict[str, Any] = {one.type: one for one in reversed([settings, *of_rules(settings)])}
    return [
        (kind, own, told[type_])
        for type_, kind in adapters.available().items()
        if (own := {name: tensor for name, tensor in factors.items() if kind.mark in name})
    ]


def _check_fused(parts: Sequence[Iterable[str]], wishes: ExportWishes) -> None:
    """Of a module in ComfyUI that is several of ours one adapter counts."""
    own = [
        {module for module in wishes.names.modules if any(n.startswith(f"{module}.") for n in part)} for part in parts
    ]
    for there, target in wishes.names.layout.targets(wishes.names.shapes):
        found = [shared for part in own if (shared := sorted(part.intersection(target.modules)))]
        for first, other in pairwise(found):
            raise UserError.of(
                f"'{first[0]}' and '{other[0]}' have adapters of different kinds; for ComfyUI both are one module, "
                f"'{there}', of which it takes one: give them one kind, or set save_format = \"diffusers\"",
                where="[[adapter.rules]] type",
            )
